"""A loaded model's report of its weights: actual formats and bytes, and any expansion."""

import torch
from transformers import AutoModelForCausalLM, Mxfp4Config

from sparselong.figures import format_bytes
from sparselong.model.description import describe_weights
from sparselong.model.loading import load_model
from sparselong.model.packed_linear import PackedLinear
from sparselong.packing.dense import DenseFormat


def bytes_of(model, *ends: str) -> str:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return format_bytes(sum(tensor.nbytes for name, tensor in tensors if name.endswith(ends)))


def test_loading_reports_formats_and_bytes_on_stderr(untrained_base, capsys):
    model = load_model(untrained_base)
    told = capsys.readouterr().err
    assert describe_weights(model) in told.splitlines()
    assert "weights as loaded on cpu: " in told
    assert f"experts: MXFP4, packed {bytes_of(model, '_blocks', '_scales')};" in told
    attention = bytes_of(model, *(f"{name}_proj.weight" for name in "qkvo"))
    assert f"attention: float32 {attention};" in told
    ends = bytes_of(model, "embed_tokens.weight", "lm_head.weight")
    assert f"embedding and lm_head: float32 {ends};" in told


def test_packed_attention_is_named_by_its_format(untrained_base):
    model = load_model(untrained_base)
    for layer in model.model.layers:
        layer.self_attn.q_proj = PackedLinear(128, 256, True, DenseFormat(4, "2:4", 64))
    told = describe_weights(model)
    packed = 4 * 256 * 128 * 3 // 8
    assert f"int4 2:4, packed {format_bytes(packed)}" in told and "attention: " in told


def test_an_expansion_is_reported(untrained_base):
    expanded = AutoModelForCausalLM.from_pretrained(
        untrained_base,
        quantization_config=Mxfp4Config(dequantize=True),
        dtype=torch.bfloat16,
    )
    told = describe_weights(expanded)
    assert "experts: bfloat16, not packed" in told and "MXFP4" not in told
