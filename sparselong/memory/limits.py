"""Config keys against the sizes of the base model: what would fail, or do nothing, later."""

from __future__ import annotations

import os
from typing import Any

from sparselong.config import Config, ModelSection
from sparselong.errors import ConfigError, StageError
from sparselong.files import read_json
from sparselong.memory.base_config import DROPPED_EXPERTS
from sparselong.memory.shape import (
    PUBLISHED,
    ModelShape,
    check_heads,
    find_config,
    find_shape,
)
from sparselong.memory.stages import CHAT_TOKENS

_PUBLISHED_POSITIONS = 131_072
"""max_position_embeddings of the published models and of `tiny`."""


def check_model(config: Config) -> None:
    """Raise if a key does not fit the base model.

    A base that is not on this machine, or whose config.json is not valid, is not checked here: the
    stage that opens it explains that.

    Raises:
        ConfigError: names the key and the model's size.
    """
    try:
        shape = find_shape(config.model)
    except StageError:
        return
    check_heads(config, shape)
    _check_kept_experts(config, shape)
    check_experts(config, shape)
    _check_ranks(config, shape)
    _check_groups(config, shape)
    _check_lengths(config)


def check_experts(config: Config, shape: ModelShape) -> None:
    """Raise if experts cannot be split evenly over `expert_parallel_degree`.

    Stage 04 shares the base's experts, stages 03 and 04 those that `experts.keep` leaves.

    Args:
        config: the config of the run.
        shape: sizes of the base model.

    Raises:
        ConfigError: the degree does not divide their number.
    """
    degree, keep = config.expert_parallel_degree, config.experts.keep
    experts = [count for count in (shape.experts, keep) if count is not None]
    if degree != "auto" and any(count % degree for count in experts):
        divisors = [n for n in range(1, shape.experts + 1) if not any(c % n for c in experts)]
        kept = f", or the {keep} of experts.keep" if keep is not None else ""
        raise ConfigError(
            f"expert_parallel_degree does not divide the {shape.experts} experts of "
            f"{config.model.base}{kept}",
            f"auto, or one of {', '.join(map(str, divisors))}",
            f"expert_parallel_degree: {degree}",
            "set expert_parallel_degree=auto, or another divisor",
        )


def _check_kept_experts(config: Config, shape: ModelShape) -> None:
    keep, base = config.experts.keep, config.model.base
    if keep is None:
        return
    least, found = shape.experts_per_token, f"experts.keep: {keep}"
    expected = f"from {least}, which each token uses, to {shape.experts - 1}"
    fix = "set experts.keep to such a number, or remove it, which keeps all experts"
    if keep < least:
        raise ConfigError(f"experts.keep is too small for {base}", expected, found, fix)
    if keep > shape.experts:
        what = f"experts.keep is more than the {shape.experts} experts a layer of {base}"
        raise ConfigError(what, expected, found, fix)
    if keep == shape.experts:
        what = f"experts.keep would remove nothing: {base} has {keep} experts a layer"
        raise ConfigError(what, expected, found, fix)
    if DROPPED_EXPERTS in _read_document(config.model):
        raise ConfigError(
            f"experts of {base} have been removed before",
            f"a base with all its experts (config.json without {DROPPED_EXPERTS})",
            f"{shape.experts} experts a layer, chosen by an earlier experts.keep",
            "choose from all experts: set model.base to the original base, or remove experts.keep",
        )


def check_layers(config: Config, layers: range | None) -> None:
    """Raise if `--layers` names layers that the model does not have.

    A base that is not on this machine yet is not checked.

    Raises:
        ConfigError: says how many it has.
    """
    try:
        count = find_shape(config.model).layers
    except StageError:
        return
    if layers is not None and layers.stop > count:
        raise ConfigError(
            f"--layers names layers that {config.model.base} does not have",
            f"A:B with B up to {count}, its number of layers",
            f"--layers {layers.start}:{layers.stop}",
            f"pass --layers {min(layers.start, count - 1)}:{count}",
        )


def _check_ranks(config: Config, shape: ModelShape) -> None:
    lora = config.lora
    narrowest = min(min(shape.projections[name]) for name in lora.target_modules)
    limits = [("lora.r", lora.r, narrowest, "width of the layers in lora.target_modules")]
    if lora.expert_r is not None:
        width = min(shape.hidden, shape.intermediate)
        limits.append(("lora.expert_r", lora.expert_r, width, "width of an expert"))
    for key, rank, most, what in limits:
        if rank > most:
            raise ConfigError(
                f"{key} is too large for {config.model.base}",
                f"at most {most}, the smallest {what}",
                f"{key}: {rank}",
                f"set {key} to {most} or less",
            )


def _check_groups(config: Config, shape: ModelShape) -> None:
    dense = config.shared_dense
    parts = {"group_size": dense.group_size if dense.weight_bits < 16 else 1}
    parts["sparsity"] = 4 if dense.sparsity == "2:4" else 1
    for key, size in parts.items():
        for name, (_, inputs) in shape.projections.items():
            if inputs % size:
                raise ConfigError(
                    f"shared_dense.{key} does not fit {config.model.base}",
                    f"a number of input weights of {name} that is a multiple of {size}",
                    f"{inputs}",
                    f"change shared_dense.{key}, or use another base model",
                )


def _check_lengths(config: Config) -> None:
    most = _positions(config.model)
    lengths = {
        "sequence_len": config.sequence_len,
        "calibration.sequence_len": config.calibration.sequence_len,
    }
    if config.evaluation.ruler_tasks:
        lengths["evaluation.ruler.lengths"] = max(config.evaluation.ruler.lengths)
    if config.evaluation.health_prompts:
        lengths["evaluation.health_tokens"] = config.evaluation.health_tokens
    for key, length in lengths.items():
        asked = CHAT_TOKENS if key == "evaluation.health_tokens" else 0
        if length + asked > most:
            raise ConfigError(
                f"{key} is longer than {config.model.base} supports",
                f"at most {most:,} tokens, its max_position_embeddings"
                + (f", {asked} of them for the question" if asked else ""),
                f"{key}: {length:,}",
                f"set {key} to {most - asked} or less",
            )


def _positions(model: ModelSection) -> int:
    found = _read_document(model).get("max_position_embeddings")
    return found if type(found) is int else _PUBLISHED_POSITIONS


def _read_document(model: ModelSection) -> dict[str, Any]:
    """Return the base's config.json; empty for a base that is known without it."""
    is_built_in = model.base in PUBLISHED and not os.path.isdir(model.base)
    path = None if is_built_in else find_config(model)
    return {} if path is None else read_json(path)
