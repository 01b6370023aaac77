"""Display names of a plan's components, by key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Number = TypeVar("Number", int, float)

LABELS = {
    # Weights of a model, by group.
    "experts": "experts",
    "attention": "attention",
    "embedding": "embedding and lm_head",
    "small": "router, norms, biases, sinks",
    # Memory of stage 03.
    "expert_buffers": "two layers of experts",
    "page_tables": "page tables of host memory",
    "projections": "attention projections, packed",
    "masters": "masters, masks, scales of LoRA layers",
    "lora": "LoRA, gradients, optimizer",
    "activations": "activations of the other layers",
    "checkpoints": "activation checkpoints",
    "kept_attention": "kept attention outputs",
    "kept_experts": "kept expert outputs",
    "gaps": "allocator fragmentation",
    "layer": "one layer, recomputed",
    "experts_work": "experts, working memory",
    "attention_work": "attention, working memory",
    "loss": "logits and cross-entropy",
    "workspaces": "cuBLAS workspaces",
    "nccl": "NCCL buffers",
    "context": "CUDA context",
    "libraries": "Python and libraries",
    "decoded": "decoded weights",
    # Memory of stages 02 and 04.
    "layer_weights": "one layer's weights",
    "hessian": "Hessian, inverse, factors",
    "live": "live layer activations",
    "layer_read": "the layer being read",
    "layer_written": "the layer being written",
    "hidden_states": "calibration hidden states",
    "base_rest": "the rest of the base model",
    "logits": "logits",
    "cache": "keys and values of an answer",
    # Files.
    "base": "base model",
    "compressed_model": "02_compress/model",
    "compressed_masters": "02_compress/masters",
    "finetuned_model": "03_finetune/model",
    "finetune_checkpoints": "03_finetune/checkpoints",
    "adapter": "03_finetune/adapter",
    "compress_work": "02_compress/work, temporary",
    "evaluate_work": "04_eval/states, temporary",
}


def label(components: Mapping[str, Number]) -> dict[str, Number]:
    """Return components by display name, in the same order."""
    return {LABELS[key]: value for key, value in components.items()}
