"""Loading checkpoints: logits of transformers on the decoded weights, and refusals."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, Mxfp4Config, Trainer, TrainingArguments

from sparselong.errors import StageError
from sparselong.model import load_model, load_tokenizer
from sparselong.model.loading import packed_config
from sparselong.model.packed_experts import PackedExperts
from sparselong.model.packed_linear import PackedLinear
from sparselong.model.quantizer import SparseLongConfig, check_packed
from sparselong.packing.dense import DenseFormat


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 2000, (2, 150), generator=torch.Generator().manual_seed(0))


def test_a_directory_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path):
    for open_it in (load_model, packed_config, lambda path: packed_config(str(path))):
        with pytest.raises(StageError) as refused:
            open_it(tmp_path / "gone")
        assert refused.value.found == "no such directory"


def test_upstream_form_gives_transformers_logits(untrained_base, tokens):
    """Relative error ≤ 1e-5 in fp32 to transformers' eager model on the decoded weights."""
    ours = load_model(untrained_base)
    theirs = AutoModelForCausalLM.from_pretrained(
        untrained_base,
        quantization_config=Mxfp4Config(dequantize=True),
        dtype=torch.float32,
        attn_implementation="eager",
    ).float()  # dequantized experts are bf16 whatever dtype is requested
    with torch.no_grad():
        got, wanted = ours(tokens).logits, theirs(tokens).logits
    assert (got - wanted).norm() / wanted.norm() <= 1e-5
    assert not any(p.requires_grad for p in ours.parameters())
    expert_bytes = sum(
        b.nbytes for n, b in ours.named_buffers() if n.endswith(("_blocks", "_scales"))
    )
    weights = sum(
        p.numel() for n, p in theirs.named_parameters() if n.endswith(("gate_up_proj", "down_proj"))
    )
    assert expert_bytes * 8 / weights == 4.25


def test_from_pretrained_keeps_upstream_experts_packed(untrained_base, tokens):
    """Without sparselong, transformers would expand them to bf16 on this machine."""
    config = packed_config(untrained_base)
    model = AutoModelForCausalLM.from_pretrained(
        untrained_base, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    assert all(isinstance(layer.mlp.experts, PackedExperts) for layer in model.model.layers)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, load_model(untrained_base)(tokens).logits)
    with pytest.raises(ValueError, match="float16 cannot hold"):
        AutoModelForCausalLM.from_pretrained(untrained_base, config=config, dtype=torch.float16)


def test_the_experts_implementation_is_named_and_refuses_unpacked_experts(untrained_base, tokens):
    packed = AutoModelForCausalLM.from_pretrained(
        untrained_base, config=packed_config(untrained_base)
    )
    assert packed.config._experts_implementation == "sparselong"
    expanded = AutoModelForCausalLM.from_pretrained(
        untrained_base,
        quantization_config=Mxfp4Config(dequantize=True),
        experts_implementation="sparselong",
    )
    with pytest.raises(ValueError, match=r"GptOssExperts.*sparselong.packed_config"):
        expanded(tokens)


def test_transformers_trainer_works_without_peft(untrained_base, tmp_path):
    """The trainer refuses a model without is_trainable or is_qat_trainable."""
    model = load_model(untrained_base)
    model.model.norm.weight.requires_grad_(True)
    before = model.model.norm.weight.detach().clone()
    packed = model.model.layers[0].mlp.experts.down_proj_blocks.clone()
    rows = [{"input_ids": torch.arange(20), "labels": torch.arange(20)}] * 2
    arguments = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to=[])
    Trainer(model=model, args=arguments, train_dataset=rows).train()  # pyright: ignore[reportArgumentType]
    assert not torch.equal(model.model.norm.weight, before)
    assert torch.equal(model.model.layers[0].mlp.experts.down_proj_blocks, packed)


@pytest.mark.parametrize(
    ("field", "value"),
    [("weight_bits", 5), ("sparsity", "1:4"), ("group_size", 48), ("expert_sparsity", "1:8")],
)
def test_an_unknown_storage_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"quantization_config.{field}: '?{value}'?; allowed: "):
        SparseLongConfig(**{field: value})


def test_missing_tensors_are_refused(untrained_base, tmp_path):
    broken = shutil.copytree(untrained_base, tmp_path / "broken")
    path = broken / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    lost = "model.layers.1.mlp.experts.down_proj_scales"
    shard = index["weight_map"].pop(lost)
    path.write_text(json.dumps(index))
    from safetensors.torch import load_file, save_file

    tensors = load_file(broken / shard)
    del tensors[lost]
    save_file(tensors, broken / shard, {"format": "pt"})
    with pytest.raises(StageError, match="down_proj_scales"):
        load_model(broken)


BLOCKS = "model.layers.1.mlp.experts.gate_up_proj_blocks"


def change(base, folder, name, function):
    """Copy a checkpoint with one tensor replaced."""
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(base, folder / "broken")
    index = json.loads((broken / "model.safetensors.index.json").read_text())
    shard = broken / index["weight_map"][name]
    tensors = load_file(shard)
    tensors[name] = function(tensors[name]).contiguous()
    save_file(tensors, shard, {"format": "pt"})
    return broken


def test_misshaped_experts_are_refused_by_name(untrained_base, tmp_path):
    broken = change(untrained_base, tmp_path, BLOCKS, lambda blocks: blocks[:, :-2])
    with pytest.raises(StageError, match="layers.*gate_up_proj_blocks"):
        load_model(broken)


def test_experts_of_another_type_are_refused_by_name(untrained_base, tmp_path):
    broken = change(untrained_base, tmp_path, BLOCKS, lambda blocks: blocks.view(torch.int8))
    with pytest.raises(
        StageError, match=r"(?s)gate_up_proj_blocks does not have .*found: *torch.int8"
    ):
        load_model(broken)


def test_a_nan_scale_is_refused_by_name_before_anything_is_computed(untrained_base, tmp_path):
    scales = BLOCKS.replace("_blocks", "_scales")
    broken = change(
        untrained_base, tmp_path, scales, lambda t: t.index_fill(0, torch.tensor(3), 255)
    )
    with pytest.raises(StageError, match="layers.1.mlp.experts.gate_up_proj_scales is damaged"):
        load_model(broken)


def test_an_invalid_mask_pattern_is_refused_by_name(untrained_base):
    """The Triton kernels would read it as four zeros."""
    model = load_model(untrained_base)
    packed = PackedLinear(128, 256, True, DenseFormat(4, "2:4", 64))
    for tensor in packed.packed().values():
        tensor.zero_()
    model.model.layers[2].self_attn.q_proj = packed
    check_packed(model)
    packed.packed()["weight_mask"][7, 4] = 0xFF
    with pytest.raises(StageError, match="layers.2.self_attn.q_proj.weight_mask is damaged"):
        check_packed(model)


def test_a_truncated_shard_is_refused(untrained_base, tmp_path):
    broken = shutil.copytree(untrained_base, tmp_path / "broken")
    index = json.loads((broken / "model.safetensors.index.json").read_text())
    shard = broken / index["weight_map"][BLOCKS]
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(StageError, match="truncated"):
        load_model(broken)


def test_more_experts_per_token_than_experts_is_refused(untrained_base, tmp_path):
    broken = shutil.copytree(untrained_base, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 9}))
    with pytest.raises(StageError, match="more experts than the model has") as caught:
        load_model(broken)
    assert "num_experts_per_tok 9" in caught.value.found


def test_other_models_are_refused(untrained_base, tmp_path):
    other = shutil.copytree(untrained_base, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    del config["quantization_config"]
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(StageError, match="cannot be opened"):
        load_model(other)


def test_tokenizer_has_the_chat_template(untrained_base):
    tokenizer = load_tokenizer(untrained_base)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert "<|start|>user<|message|>hi<|end|>" in text


@pytest.mark.parametrize(
    "first",
    [
        # Partly imported when registration runs: transformers' own model file, and one of ours.
        "transformers.models.gpt_oss.modeling_gpt_oss",
        "sparselong.model.quantizer",
    ],
)
def test_importing_sparselong_is_quick_and_still_registers(first):
    """`import sparselong` does not import torch; names are registered once models can load."""
    script = (
        "import sys, sparselong\n"
        "assert 'torch' not in sys.modules\n"
        f"import {first}\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as configs\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as quantizers\n"
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as experts\n"
        "from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks\n"
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as attention\n"
        "for names in (configs, quantizers, experts, masks, attention):\n"
        "    assert 'sparselong' in names, names\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=dict(os.environ))
