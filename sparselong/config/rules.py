"""Rules between keys: combinations of values that could only fail later."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, get_args

from sparselong.config.cost import GpuType
from sparselong.config.data import Share
from sparselong.config.keys import KeyFault
from sparselong.config.refusals import show_sections
from sparselong.files import is_local

if TYPE_CHECKING:
    from sparselong.config.schema import Config
    from sparselong.config.training import Schedule

_SHAPED: Mapping[str, tuple[Schedule, ...]] = {
    "min_lr_ratio": (
        *("cosine_with_min_lr", "cosine_warmup_with_min_lr", "polynomial", "rex"),
        *("warmup_stable_decay", "reduce_lr_on_plateau", "greedy"),
    ),
    "lr_cycles": ("cosine_with_restarts",),
    "lr_decay_ratio": ("warmup_stable_decay",),
    "lr_patience": ("reduce_lr_on_plateau", "greedy"),
}
"""Keys that shape a learning rate schedule, with the schedules that take them."""
_NEEDED: Mapping[Schedule, str] = {
    "cosine_with_min_lr": "min_lr_ratio",
    "cosine_warmup_with_min_lr": "min_lr_ratio",
    "greedy": "min_lr_ratio",
    "cosine_with_restarts": "lr_cycles",
    "warmup_stable_decay": "lr_decay_ratio",
}
"""Schedules with the key that they cannot do without."""
_WITHOUT_WARM_UP: tuple[Schedule, ...] = ("constant", "reduce_lr_on_plateau", "greedy")


def check_rules(config: Config) -> None:
    """Raise if a key does not fit the others.

    Raises:
        KeyFault: names the key; its message says what is expected.
    """
    _check_attention(config)
    _check_adapters(config)
    _check_checkpointing(config)
    _check_kept(config)
    _check_steps(config)
    _check_stopping(config)
    _check_schedule(config)
    _check_tasks(config)
    _check_ruler(config)
    _check_shares(config)
    _check_prices(config)


def _check_attention(config: Config) -> None:
    backend = config.attention_backend
    if backend == "torch_cudnn":
        raise KeyFault(
            "attention_backend",
            "attention_backend: torch_cudnn supports neither sliding windows, which every "
            "second layer of gpt-oss has, nor packed documents; `auto` uses it where it can",
        )
    if backend != "auto" and not config.flash_attention:
        raise KeyFault(
            "attention_backend", f"attention_backend: {backend} needs flash_attention: true"
        )


def _check_adapters(config: Config) -> None:
    lora = config.lora
    for key in ("target_modules", "expert_targets"):
        names = getattr(lora, key)
        if len(set(names)) < len(names):
            raise KeyFault(f"lora.{key}", f"lora.{key}: {', '.join(names)} lists a weight twice")
    if lora.expert_targets and lora.expert_r is None:
        raise KeyFault(
            "lora.expert_r", "lora.expert_targets need lora.expert_r, the rank of their adapters"
        )
    if lora.expert_r is not None and not lora.expert_targets:
        raise KeyFault(
            "lora.expert_r",
            f"lora.expert_r: {lora.expert_r} has no effect because lora.expert_targets is empty",
        )
    if lora.expert_dtype != "float32" and not lora.expert_targets:
        raise KeyFault(
            "lora.expert_dtype",
            f"lora.expert_dtype: {lora.expert_dtype} has no effect because lora.expert_targets is "
            "empty",
        )
    if lora.expert_targets and config.experts.sparsity != "none":
        raise KeyFault(
            "lora.expert_targets",
            f"lora.expert_targets need experts.sparsity: none, not {config.experts.sparsity}: "
            "an expert's adapter would fill the weights that 2:4 has dropped",
        )


def _check_checkpointing(config: Config) -> None:
    training = config.training
    if training.gradient_checkpointing:
        return
    for key, unused in (
        ("slice_rows", ("auto", "never")),
        ("offload_checkpoints", ("auto", False)),
    ):
        value = getattr(training, key)
        if value not in unused:
            raise KeyFault(
                f"training.{key}",
                f"training.{key}: {str(value).lower()} needs training.gradient_checkpointing: true",
            )


def _check_kept(config: Config) -> None:
    for key, why in config.nothing_to_keep("cuda").items():
        if getattr(config.training, key) == "always":
            raise KeyFault(
                f"training.{key}",
                f"training.{key}: use auto or never; nothing can be kept: {why}",
            )


def _check_steps(config: Config) -> None:
    training = config.training
    if training.save_steps % training.eval_steps:
        raise KeyFault(
            "training.save_steps",
            f"training.save_steps ({training.save_steps}) must be a multiple of "
            f"training.eval_steps ({training.eval_steps}): transformers requires it for "
            "loading the best model",
        )
    if training.save_steps % training.logging_steps:
        raise KeyFault(
            "training.logging_steps",
            f"training.save_steps ({training.save_steps}) must be a multiple of "
            f"training.logging_steps ({training.logging_steps}): resumed curves must continue",
        )


def _check_stopping(config: Config) -> None:
    training = config.training
    if training.early_stopping_threshold and training.early_stopping_patience is None:
        raise KeyFault(
            "training.early_stopping_threshold",
            f"training.early_stopping_threshold: {training.early_stopping_threshold} has no effect "
            "without training.early_stopping_patience",
        )


def _check_schedule(config: Config) -> None:
    training = config.training
    name = training.lr_scheduler
    for key, schedules in _SHAPED.items():
        if getattr(training, key) is not None and name not in schedules:
            raise KeyFault(
                f"training.{key}",
                f"training.{key} has no effect with training.lr_scheduler: {name}; it is for "
                f"{', '.join(schedules)}",
            )
    needed = _NEEDED.get(name)
    if needed is not None and getattr(training, needed) is None:
        raise KeyFault(
            f"training.{needed}", f"training.lr_scheduler: {name} needs training.{needed}"
        )
    if name in _WITHOUT_WARM_UP and training.warmup_ratio:
        raise KeyFault(
            "training.warmup_ratio",
            f"training.lr_scheduler: {name} has no warm-up: it needs training.warmup_ratio: 0"
            + (", or use constant_with_warmup" if name == "constant" else ""),
        )
    if training.warmup_ratio + (training.lr_decay_ratio or 0.0) > 1.0:
        raise KeyFault(
            "training.lr_decay_ratio",
            "training.warmup_ratio and training.lr_decay_ratio: together at most 1",
        )


def _check_tasks(config: Config) -> None:
    tasks = config.evaluation.tasks
    if len(set(tasks)) < len(tasks):
        raise KeyFault(
            "evaluation.tasks", f"evaluation.tasks: {', '.join(tasks)} names a task twice"
        )
    for name in tasks:
        if "/" in name or name.endswith((".yaml", ".yml", ".json")):
            raise KeyFault(
                "evaluation.tasks",
                f"evaluation.tasks: names of lm-eval's tasks, not files such as {name}",
            )


def _check_ruler(config: Config) -> None:
    lengths = config.evaluation.ruler.lengths
    if len(set(lengths)) < len(lengths):
        shown = ", ".join(map(str, lengths))
        raise KeyFault(
            "evaluation.ruler.lengths", f"evaluation.ruler.lengths: {shown} names a length twice"
        )


def _check_shares(config: Config) -> None:
    shares = config.data.shares
    sources = [os.path.normpath(each.source) for each in shares]  # ./a.jsonl is a.jsonl
    if isinstance(config.data.train, str):
        _check_one(config.data.train)
    if not shares:
        raise KeyFault("data.train", "data.train: at least one source")
    if not isinstance(config.data.train, str) and "demo" in sources:
        raise KeyFault("data.train", "data.train: demo alone, which cannot be one of several")
    if len(set(sources)) < len(sources):
        raise KeyFault("data.train", "data.train: each source once; its weight decides how often")
    if len({each.weight is None for each in shares}) > 1:
        raise KeyFault(
            "data.train",
            "data.train: a weight for each source, or for none",
            shlex.quote(f"data.train={show_sections(Share, sources, 'weight')}"),
        )


def _check_one(train: str) -> None:
    """Raise if the text of one source lists several; a path may have a comma, too."""
    names = [name.strip() for name in train.strip("[]").split(",") if name.strip()]
    are_files = all(os.path.splitext(name)[1] or os.path.exists(name) for name in names)
    listed = train.startswith("[") or are_files or not any(map(is_local, names))
    if len(names) > 1 and listed and not os.path.exists(train):
        raise KeyFault(
            "data.train",
            "one source, or a list of {source: …}",
            shlex.quote(f"data.train={show_sections(Share, names)}"),
        )


def _check_prices(config: Config) -> None:
    prices = config.cost.per_gpu_hour
    example = "for example 'cost.per_gpu_hour={H200: 3.5}'"
    for kind, price in prices.items() if isinstance(prices, dict) else ():
        if kind not in get_args(GpuType):
            types = ", ".join(get_args(GpuType))
            raise KeyFault("cost.per_gpu_hour", f"cost.per_gpu_hour: {types}, not {kind}", example)
        if not 0.0 < price <= 1e6:
            raise KeyFault(
                "cost.per_gpu_hour", f"cost.per_gpu_hour: a price above 0 for {kind}", example
            )
