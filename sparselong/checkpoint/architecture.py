"""Names, dtypes and shapes of the published gpt-oss tensors, derived from config.json."""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import GptOssConfig

from sparselong.checkpoint.checkpoint import Checkpoint
from sparselong.checkpoint.format import PROJECTIONS, expert_shapes
from sparselong.checkpoint.inventory import METHOD
from sparselong.errors import StageError

Shapes = dict[str, tuple[str, tuple[int, ...]]]


def layer_tensors(config: GptOssConfig, layer: int) -> Shapes:
    """Return name → (safetensors dtype, shape) for the tensors of one layer."""
    prefix = f"model.layers.{layer}"
    hidden, head_dim = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    experts = config.num_local_experts
    tensors: Shapes = {
        f"{prefix}.input_layernorm.weight": ("BF16", (hidden,)),
        f"{prefix}.post_attention_layernorm.weight": ("BF16", (hidden,)),
        f"{prefix}.self_attn.sinks": ("BF16", (config.num_attention_heads,)),
        f"{prefix}.mlp.router.weight": ("BF16", (experts, hidden)),
        f"{prefix}.mlp.router.bias": ("BF16", (experts,)),
    }
    sizes = ((queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries))
    for name, (out_features, in_features) in zip(PROJECTIONS, sizes, strict=True):
        tensors[f"{prefix}.self_attn.{name}.weight"] = ("BF16", (out_features, in_features))
        tensors[f"{prefix}.self_attn.{name}.bias"] = ("BF16", (out_features,))
    for name, shape in expert_shapes(config).items():
        dtype = "BF16" if name.endswith("_bias") else "U8"
        tensors[f"{prefix}.mlp.experts.{name}"] = (dtype, shape)
    return tensors


def model_tensors(config: GptOssConfig) -> Shapes:
    """Return name → (safetensors dtype, shape) for all tensors of the model."""
    table = (config.vocab_size, config.hidden_size)
    tensors: Shapes = {
        "model.embed_tokens.weight": ("BF16", table),
        "model.norm.weight": ("BF16", (config.hidden_size,)),
        "lm_head.weight": ("BF16", table),
    }
    for layer in range(config.num_hidden_layers):
        tensors |= layer_tensors(config, layer)
    return tensors


def open_upstream(checkpoint: Checkpoint) -> GptOssConfig:
    """Return the architecture of a published gpt-oss checkpoint after checking its tensors.

    Raises:
        StageError: it is another model, is already compressed, or its tensors do not match.
    """
    method = (checkpoint.config.get("quantization_config") or {}).get("quant_method")
    if method == METHOD:
        raise _refuse(checkpoint, "already compressed (quant_method sparselong)", "the base model")
    if checkpoint.config.get("model_type") != "gpt_oss":
        found = f"model_type {checkpoint.config.get('model_type')!r}"
        raise _refuse(checkpoint, found, "openai/gpt-oss-20b or -120b, or a fine-tune of them")
    if method != "mxfp4":
        raise _refuse(checkpoint, f"quant_method {method!r}", "a checkpoint with MXFP4 experts")
    try:
        config = GptOssConfig(**_architecture(checkpoint.config))
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise StageError(
            f"{checkpoint.directory / 'config.json'} does not describe a gpt-oss model",
            "the keys of openai/gpt-oss's config.json",
            str(error).splitlines()[0],
            "download config.json again",
        ) from error
    checkpoint.check(model_tensors(config))
    return config


def _architecture(document: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key != "quantization_config"}


def _refuse(checkpoint: Checkpoint, found: str, wanted: str) -> StageError:
    return StageError(
        f"{checkpoint.directory} cannot be compressed",
        "a gpt-oss checkpoint as published: bf16 with MXFP4 experts",
        found,
        f"set model.base to {wanted}",
    )
