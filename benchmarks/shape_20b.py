"""Models in gpt-oss's shapes with random weights, for each arm of the benchmarks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.models.gpt_oss import modeling_gpt_oss

from sparselong.adapters.attach import ExtraAdapters, add_masked_lora
from sparselong.adapters.expert_lora import EXPERT_WEIGHTS
from sparselong.checkpoint.format import PROJECTIONS
from sparselong.memory import Kept
from sparselong.model import slice_rows
from sparselong.model.fused import chunk_loss, fuse
from sparselong.model.host_embedding import move_embedding
from sparselong.model.host_experts import HostExperts, find_host_experts
from sparselong.model.packed_experts import PackedExperts, reserve_host_memory
from sparselong.model.packed_linear import PackedLinear
from sparselong.model.quantizer import replace_with_packed
from sparselong.packing import dense, integer
from sparselong.packing.dense import DenseFormat
from sparselong.runtime import DeviceInputs, HostInputs, checkpoint_layers

BASELINES = ("eager", "flex")
OURS = ("lora", "masked", "experts")
SPARSE = ("masked", "experts")
"""Arms with masked 2:4 int4 attention; `experts` adapts experts and routers as well."""
R, ALPHA, EXPERT_R = 16, 32, 8
PUBLISHED = DenseFormat(16, "none", 64)
COMPRESSED = DenseFormat(4, "2:4", 64)


def config_20b(layers: int = 24) -> GptOssConfig:
    """Return openai/gpt-oss-20b's published configuration."""
    return config_of(layers, 32)


def config_of(layers: int, experts: int, vocab: int = 201_088) -> GptOssConfig:
    """Return gpt-oss's published configuration with other numbers of layers, experts and tokens."""
    kinds = ["sliding_attention", "full_attention"] * (layers // 2)
    return GptOssConfig(
        num_hidden_layers=layers, num_local_experts=experts, layer_types=kinds, vocab_size=vocab
    )


def build(
    arm: str,
    keep_attention: bool = True,
    layers: int = 24,
    r: int = R,
    *,
    keep_experts: int = 0,
) -> nn.Module:
    """Return the arm's model on the GPU, ready for training."""
    config = config_20b(layers)
    if arm in OURS:
        return adapt(build_packed(config, arm), arm, Kept(keep_attention, keep_experts), r)
    model = build_baseline(config, arm)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    lora = LoraConfig(r=r, lora_alpha=ALPHA, target_modules=list(PROJECTIONS))
    return get_peft_model(model, lora).train()


def adapt(
    model: Any, arm: str, kept: Kept, r: int = R, expert_dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Return one of this project's models with checkpointing and the arm's adapters."""
    fuse(model)
    chunk_loss(model)
    compute_layers(model, kept)
    model.enable_input_require_grads()
    if arm in SPARSE:
        extra = (
            ExtraAdapters(EXPERT_WEIGHTS, EXPERT_R, router=True, expert_dtype=expert_dtype)
            if arm == "experts"
            else ExtraAdapters()
        )
        masters = partial(give_up, model)
        tuned, _ = add_masked_lora(
            model,
            targets=PROJECTIONS,
            r=r,
            alpha=ALPHA,
            master_of=masters,
            seed=0,
            extra=extra,
        )
    else:
        lora = LoraConfig(r=r, lora_alpha=ALPHA, target_modules=list(PROJECTIONS))
        tuned = get_peft_model(model, lora)
    return tuned.train()


def compute_layers(
    model: Any, kept: Kept, rows: int | None = None, *, offloads: bool = False
) -> None:
    """Let a model's checkpointed layers compute and keep what stage 03 lets them.

    Args:
        model: one of this project's models, without PEFT's wrapper.
        kept: which results layers keep.
        rows: most tokens of a slice; None: whole layers, under torch's checkpoints.
        offloads: whether layers' inputs are kept in host memory; needs `rows`.
    """
    if rows is not None:
        slice_rows(model, rows, HostInputs() if offloads else DeviceInputs(), kept.attention)
        return
    checkpoint_layers(model, *kept)


def build_baseline(config: GptOssConfig, arm: str) -> GptOssForCausalLM:
    """Return transformers' model in bf16."""
    attention = {"eager": "eager", "flex": "flex_attention"}[arm]
    with torch.device("cuda"):
        return GptOssForCausalLM._from_config(
            config,
            dtype=torch.bfloat16,
            attn_implementation=attention,
            experts_implementation="grouped_mm",
        )


def build_packed(config: GptOssConfig, arm: str, attention: str = "sparselong"):
    """Return this project's model: experts in MXFP4, attention in bf16 or packed 2:4 int4."""
    with torch.device("meta"):
        model = GptOssForCausalLM._from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention
        )
        replace_with_packed(model, COMPRESSED if arm in SPARSE else PUBLISHED)
        model.bfloat16()
    host = reserve_experts(model)
    model.to_empty(device="cuda")
    with torch.no_grad(), torch.device("cuda"):
        model.model.rotary_emb = modeling_gpt_oss.GptOssRotaryEmbedding(config)
        fill(model)
    if host is not None:
        host.start(torch.device("cuda", torch.cuda.current_device()))
        move_embedding(model)
    return model.requires_grad_(False)


def reserve_experts(model: nn.Module) -> HostExperts | None:
    """Give experts that belong in host memory their place there; None: none do."""
    reserve_host_memory(model, locked=True)
    for module in model.modules():
        if isinstance(module, PackedExperts) and module.host is not None:
            for name, tensor in module.host.tensors(module.layer).items():
                setattr(module, name, tensor)
    return find_host_experts(model)


def fill(model: nn.Module) -> None:
    """Fill a model with random values of a trained model's magnitude, drawn on the GPU.

    Experts in host memory get the bytes that they would get on the GPU.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("_blocks", "_scales")):
            # scales 2^-8 … 2^-5: weights of about 0.02
            bounds = (0, 256) if name.endswith("_blocks") else (119, 123)
            drawn = tensor if tensor.is_cuda else torch.empty_like(tensor, device="cuda")
            tensor.copy_(drawn.random_(*bounds))
        elif "norm" in name:
            tensor.fill_(1.0)
        elif tensor.is_floating_point() and "rotary" not in name:
            tensor.normal_(0.0, 0.02)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            fill_packed(module)


def fill_packed(layer: PackedLinear) -> None:
    """Fill a layer with a random 2:4 weight in its format, and keep the weight as its master."""
    shape = (layer.out_features, layer.in_features)
    weight = torch.randn(shape, device="cuda").mul_(0.02).to(torch.bfloat16)
    groups = weight.float().abs().view(shape[0], -1, 4)
    mask = groups.argsort(-1).argsort(-1).ge(2).view(shape)
    kept = torch.where(mask, weight.float(), 0.0).view(shape[0], -1, layer.fmt.group_size)
    scale = (kept.abs().amax(-1) / 7).to(torch.bfloat16)
    codes = integer.quantize(kept.view(shape), scale, layer.fmt.weight_bits)
    for name, tensor in dense.pack(layer.fmt, codes, mask, scale).items():
        getattr(layer, name).copy_(tensor)
    layer.drawn = weight  # type: ignore[assignment]


def give_up(model: nn.Module, module: str) -> torch.Tensor:
    """Return and release the master that `fill_packed` drew for a module."""
    layer: Any = model.get_submodule(module)
    master = layer.drawn
    del layer.drawn
    return master
