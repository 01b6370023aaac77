"""Names, dtypes and shapes of the published gpt-oss tensors, derived from config.json."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, GptOssConfig

from sparselong.checkpoint.checkpoint import Checkpoint
from sparselong.checkpoint.format import PROJECTIONS, expert_shapes
from sparselong.errors import StageError
from sparselong.files import read_json
from sparselong.memory import read_base_config

Shapes = dict[str, tuple[str, tuple[int, ...]]]
_LAYERS = "model.layers."
_MALFORMED = (
    *(ArithmeticError, AttributeError, LookupError, TypeError, ValueError),
    StrictDataclassError,
)
"""What transformers raises for a value that it cannot use."""


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
        StageError: it is another model, is already compressed, its config.json is faulty, or its
            tensors do not match config.json.
    """
    path = checkpoint.directory / "config.json"
    read_base_config(path)  # refuses what transformers would read differently or not at all
    document = read_json(path)
    document.pop("quantization_config")
    shadowing = [key for key in document if callable(getattr(GptOssConfig, key, None))]
    if shadowing:
        raise _refuse_config(path, f"{shadowing[0]}, the name of a method in transformers")
    try:
        config = GptOssConfig(**document)
    except _MALFORMED as error:
        found = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise _refuse_config(path, found) from error
    _check_generation(checkpoint.directory)
    _refuse_dequantized(checkpoint)
    _check_layers(checkpoint, config)
    checkpoint.check(model_tensors(config))
    return config


def _refuse_config(path: Path, found: str) -> StageError:
    return StageError(
        f"{path} does not describe a gpt-oss model",
        "the keys of openai/gpt-oss's config.json",
        found,
        "restore config.json from the published checkpoint",
    )


def _check_generation(directory: Path) -> None:
    """Raise if transformers cannot use generation_config.json, which it opens with the model."""
    if not (directory / "generation_config.json").exists():
        return
    read_json(directory / "generation_config.json")
    try:
        GenerationConfig.from_pretrained(directory)
    except (*_MALFORMED, OSError) as error:
        raise StageError(
            f"{directory / 'generation_config.json'} cannot be used",
            "generation parameters that transformers accepts",
            f"{type(error).__name__}: {' '.join(str(error).split())}",
            "restore generation_config.json from the published checkpoint",
        ) from error


def _refuse_dequantized(checkpoint: Checkpoint) -> None:
    """Raise if experts are stored in bf16, as after saving a dequantized model."""
    plain = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
    names = [name for name in checkpoint.tensors if name.endswith(plain)]
    if names:
        record = checkpoint.tensors[names[0]]
        raise StageError(
            f"{checkpoint.directory} cannot be compressed: its experts are dequantized",
            "experts in MXFP4 (tensors *_blocks and *_scales), as published",
            f"{len(names)} tensors of whole experts, such as {names[0]}: {record.dtype} "
            f"{list(record.shape)}",
            "set model.base to a checkpoint with MXFP4 experts, e.g. the published one",
        )


def _check_layers(checkpoint: Checkpoint, config: GptOssConfig) -> None:
    """Raise if config.json has another number of layers than the tensors."""
    numbers = {name.split(".")[2] for name in checkpoint.tensors if name.startswith(_LAYERS)}
    if len(numbers) != config.num_hidden_layers:
        raise StageError(
            f"{checkpoint.directory} does not have the layers of its config.json",
            f"{config.num_hidden_layers} layers (num_hidden_layers)",
            f"tensors of {len(numbers)} layers",
            "check that config.json and the weights belong together",
        )
