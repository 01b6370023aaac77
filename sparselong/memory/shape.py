"""The sizes of a gpt-oss model, as integers, without loading it.

All plans follow from eleven numbers of the model's configuration. The two published models are
built in under their hub names, the `tiny` model is that of sparselong.tiny.build, and any other
base is read from its config.json. Parameter counts are exact: for the published models they equal
the checkpoints' to the last parameter.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from sparselong.config import Config, ModelSection
from sparselong.errors import ConfigError, StageError
from sparselong.files import is_local, why_unusable
from sparselong.memory.base_config import read_base_config


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a gpt-oss model that the planner needs."""

    layers: int
    experts: int
    full_layers: int
    """Layers with full attention; the others have the sliding window."""
    hidden: int = 2880
    heads: int = 64
    kv_heads: int = 8
    head_dim: int = 64
    intermediate: int = 2880
    experts_per_token: int = 4
    vocab: int = 201_088
    sliding_window: int = 128

    @property
    def query_width(self) -> int:
        """Width of all query heads together, which is o_proj's input."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads (or value heads) together."""
        return self.kv_heads * self.head_dim

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(output, input) features of each attention projection in a layer."""
        return {
            "q_proj": (self.query_width, self.hidden),
            "k_proj": (self.kv_width, self.hidden),
            "v_proj": (self.kv_width, self.hidden),
            "o_proj": (self.hidden, self.query_width),
        }

    @property
    def expert_weights(self) -> int:
        """Weights of all experts in all layers, without biases."""
        return self.layers * self.experts * 3 * self.intermediate * self.hidden

    @property
    def expert_biases(self) -> int:
        """Biases of all experts in all layers."""
        return self.layers * self.experts * (2 * self.intermediate + self.hidden)

    @property
    def attention_weights(self) -> int:
        """Weights of the q, k, v and o projections in all layers, without biases."""
        return self.layers * sum(rows * columns for rows, columns in self.projections.values())

    @property
    def attention_biases(self) -> int:
        """Biases of the q, k, v and o projections in all layers."""
        return self.layers * sum(rows for rows, _ in self.projections.values())

    @property
    def sinks(self) -> int:
        """Learned sink logits, one per query head and layer."""
        return self.layers * self.heads

    @property
    def router(self) -> int:
        """Router weights and biases in all layers."""
        return self.layers * self.experts * (self.hidden + 1)

    @property
    def norms(self) -> int:
        """Weights of the norms: two per layer and the final one."""
        return (2 * self.layers + 1) * self.hidden

    @property
    def embedding(self) -> int:
        """Embedding weights; the untied lm_head has the same number."""
        return self.vocab * self.hidden

    @property
    def small(self) -> int:
        """Other parameters that stay in bf16: router, norms, biases, sinks."""
        return self.expert_biases + self.attention_biases + self.sinks + self.router + self.norms

    @property
    def total(self) -> int:
        """Number of all parameters."""
        return self.expert_weights + self.attention_weights + 2 * self.embedding + self.small

    @property
    def active(self) -> int:
        """Weights used for one token: attention, router, its experts, lm_head."""
        chosen = self.expert_weights * self.experts_per_token // self.experts
        return chosen + self.attention_weights + self.router + self.embedding


PUBLISHED = {
    "openai/gpt-oss-120b": ModelShape(layers=36, experts=128, full_layers=18),
    "openai/gpt-oss-20b": ModelShape(layers=24, experts=32, full_layers=12),
}

_FIELDS = {
    "layers": "num_hidden_layers",
    "experts": "num_local_experts",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate": "intermediate_size",
    "experts_per_token": "num_experts_per_tok",
    "vocab": "vocab_size",
    "sliding_window": "sliding_window",
}
"""Shape field → key of config.json."""


def tiny_shape(layers: int) -> ModelShape:
    """Return the shape of the model that sparselong.tiny.build makes; a test compares them."""
    return ModelShape(
        layers=layers,
        experts=8,
        full_layers=layers // 2,
        hidden=128,
        heads=4,
        kv_heads=2,
        intermediate=128,
        vocab=2048,
        sliding_window=64,
    )


def find_shape(model: ModelSection) -> ModelShape:
    """Return the shape of the configured base model.

    Raises:
        StageError: the base is neither published, nor tiny, nor a directory or cached hub model
            with a gpt-oss config.json.
    """
    if model.base == "tiny":
        return tiny_shape(model.tiny_layers)
    if model.base in PUBLISHED and not os.path.isdir(model.base):
        return PUBLISHED[model.base]
    path = find_config(model)
    if path is None:
        found, fix = why_unusable(model.base, "directory"), "correct model.base"
        if not is_local(model.base):
            found = "no such directory, and no config.json in the hub cache"
            fix += f", or download it first: hf download {model.base} config.json"
        raise StageError(
            f"the shape of model.base {model.base!r} is unknown",
            f"{' or '.join(PUBLISHED)}, tiny, or a directory with a config.json",
            found,
            fix,
        )
    return read_shape(path)


def compressed_shape(config: Config) -> ModelShape:
    """Return the shape of the compressed model, which may have fewer experts than the base.

    Raises:
        StageError: see `find_shape`.
    """
    return drop_experts(find_shape(config.model), config)


def drop_experts(shape: ModelShape, config: Config) -> ModelShape:
    """Return a base's shape with as many experts as the config keeps."""
    return replace(shape, experts=config.experts.keep or shape.experts)


def describe_dropped(shape: ModelShape, config: Config) -> list[str]:
    """Return a plan's note on experts that are dropped; nothing if none are."""
    keep = config.experts.keep
    if keep is None:
        return []
    return [
        f"Experimental: stage 02 keeps {keep} of the base's {shape.experts} experts in each layer; "
        "stages 03 and 05 have these, 04 also measures the base."
    ]


def check_heads(config: Config, shape: ModelShape) -> None:
    """Raise if the model's KV heads cannot be gathered `heads_k_stride` at a time.

    Raises:
        ConfigError: sequences are split and the stride does not divide the number of KV heads.
    """
    if config.sequence_parallel_degree > 1 and shape.kv_heads % config.heads_k_stride:
        raise ConfigError(
            f"heads_k_stride does not divide the model's {shape.kv_heads} KV heads",
            f"a divisor of {shape.kv_heads}",
            f"heads_k_stride: {config.heads_k_stride}",
            "set heads_k_stride=1, or another divisor",
        )


def find_config(model: ModelSection) -> Path | None:
    """Return the path of the base's config.json, or None if the base is not on this machine.

    A base directory is on this machine even if it lacks that file; `tiny` is not looked for.
    """
    if model.base == "tiny":
        return None
    if os.path.isdir(model.base):
        return Path(model.base) / "config.json"
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model.base, "config.json", revision=model.revision)
    except HFValidationError:  # a path, not a hub name
        return None
    return Path(cached) if isinstance(cached, str) else None


def read_shape(path: Path) -> ModelShape:
    """Return the shape described by a gpt-oss checkpoint's config.json.

    Raises:
        StageError: see `read_base_config`.
    """
    sizes, layer_types = read_base_config(path)
    return ModelShape(
        **{field: sizes[key] for field, key in _FIELDS.items()},
        full_layers=layer_types.count("full_attention"),
    )
