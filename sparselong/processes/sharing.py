"""Decide how ranks share experts and vocabulary, where experts are, how layers compute; record why.

Ranks of an expert group exchange rows in every pass, so all ranks must decide the same: the rank
with the least memory decides, of the GPU and of the host. It also decides whether layers compute in
slices of rows, in each of which all ranks of a group take part. Only ranks of one machine may
share, because a layer's exchange moves far more bytes than the gradients of a step.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from sparselong.config import Config
from sparselong.errors import StageError
from sparselong.figures import format_bytes
from sparselong.memory import (
    CONTEXT_BYTES,
    MARGIN,
    Held,
    ModelShape,
    check_fit,
    check_host,
    compressed_shape,
    decide_evaluation_held,
    decide_held,
    decided_memory,
    describe_held,
    evaluation_memory,
    find_shape,
    host_bytes,
    settle,
)
from sparselong.processes import world as ranks
from sparselong.provenance import host_memory


@dataclass(frozen=True)
class Layers:
    """The decision on how checkpointed layers compute, for receipt and manifest.

    Attributes:
        asked: values of the run's config, by key.
        chosen: values instead of them; an attention backend of `auto` is the fastest.
    """

    asked: dict[str, int | str | bool]
    chosen: dict[str, int | str | bool]

    @classmethod
    def of(cls, config: Config, settled: Config) -> Layers:
        """Return the decision that `memory.settle` made."""
        return cls(*({key: _value(each, key) for key in _LAYERS} for each in (config, settled)))

    def settle(self, config: Config) -> Config:
        """Return the run's config with the chosen values."""
        values = {key.rpartition(".")[2]: value for key, value in self.chosen.items()}
        backend = values.pop("attention_backend")
        training = config.training.model_copy(update=values)
        return config.model_copy(update={"attention_backend": backend, "training": training})


_LAYERS = ("training.slice_rows", "training.offload_checkpoints", "attention_backend")


def _value(config: Config, key: str) -> Any:
    section, _, name = key.rpartition(".")
    return getattr(getattr(config, section) if section else config, name)


@dataclass(frozen=True)
class Sharing:
    """The decision on `expert_parallel_degree` and `experts.placement`, for receipt and manifest.

    Attributes:
        asked: `auto` or a number.
        chosen: number of ranks that share one copy of experts and vocabulary; 1: each holds all.
        replicated_peak_bytes: the planner's peak of a rank if each holds all.
        predicted_peak_bytes: the planner's peak of a rank with the chosen number.
        available_bytes: least memory of a GPU available to its rank; None without GPUs.
        asked_placement: `auto`, `gpu` or `host`.
        placement: `gpu`, or `host` for experts in host memory.
        predicted_host_bytes: the planner's host memory of a machine's ranks if experts or layers'
            inputs are there.
        available_host_bytes: least host memory available on a machine.
        layers: how checkpointed layers compute; None for stage 04, which has none.
    """

    asked: int | str
    chosen: int
    replicated_peak_bytes: int
    predicted_peak_bytes: int
    available_bytes: int | None
    asked_placement: str
    placement: Literal["gpu", "host"]
    predicted_host_bytes: int
    available_host_bytes: int
    layers: Layers | None = None

    @property
    def held(self) -> Held:
        """How experts are held, as the planner says it."""
        return Held(self.chosen, self.placement)

    def __str__(self) -> str:
        held = "each process holds all" if self.chosen == 1 else f"shared by {self.chosen}"
        predicted, replicated = map(
            format_bytes, (self.predicted_peak_bytes, self.replicated_peak_bytes)
        )
        text = f"{self.asked}: experts and vocabulary {held}; predicted peak {predicted}"
        if self.chosen > 1:
            text += f" ({replicated} if each held all)"
        if self.available_bytes is not None:
            text += f", available on the GPU {format_bytes(self.available_bytes)}"
        text += f"; experts.placement {self.asked_placement}: "
        if self.placement == "gpu":
            return text + "on the device"
        needed, free = map(format_bytes, (self.predicted_host_bytes, self.available_host_bytes))
        return f"{text}in host memory, {needed} of {free} available"


_decided: Sharing | None = None


def decided_sharing() -> Sharing | None:
    """Return this process's last decision, for stage 03 or 04; None before the first."""
    return _decided


def decide_sharing(config: Config) -> Sharing:
    """Decide how experts are held in stage 03; every connected rank must call this before it joins.

    On a CPU `auto` is 1, and the device's own memory: it is not known to be this process's own.

    Args:
        config: the run's config.

    Raises:
        StageError: fine-tuning cannot fit on the GPUs or in host memory, the experts cannot be
            split evenly, or ranks that would share experts run on different machines.
    """
    global _decided
    shape, place = compressed_shape(config), _meet()
    device, here = place.device, place.here
    limits = (here, place.budget_bytes or 0, device, place.host_bytes)
    if place.budget_bytes is None:
        held = _hold_on_cpu(config)
    else:
        check_fit(shape, config, *limits)
        held = decide_held(shape, config, *limits)
    settled = settle(shape, config, held, *limits)
    check_host(shape, settled, held, here, place.host_bytes)
    _check_machines(place.firsts, held.expert_parallel)
    replicated, predicted = (
        decided_memory(
            *(shape, each_config, place.budget_bytes or 0, device),
            held=each,
            processes_here=here,
            host_budget_bytes=place.host_bytes,
        ).peak_bytes
        for each_config, each in ((config, Held()), (settled, held))
    )
    made = _describe(shape, settled, place, held, replicated, predicted)
    _decided = replace(made, layers=Layers.of(config, settled))
    return _decided


def _describe(
    shape: ModelShape,
    config: Config,
    place: _Places,
    held: Held,
    replicated_bytes: int,
    predicted_bytes: int,
) -> Sharing:
    """Return a decision with the planner's peaks of a rank, replicated and as decided."""
    is_on_host = held.placement == "host" or config.training.offload_checkpoints is True
    return Sharing(
        config.expert_parallel_degree,
        held.expert_parallel,
        replicated_bytes,
        predicted_bytes,
        place.budget_bytes,
        config.experts.placement,
        held.placement,
        host_bytes(shape, config, held, place.here) if is_on_host else 0,
        place.host_bytes,
    )


def decide_evaluation_sharing(
    config: Config, processes: int = 1, *, with_base: bool = True
) -> Held:
    """Return how experts are held in stage 04 or in a chat; called as `decide_sharing`.

    Args:
        config: the run's config.
        processes: number of processes that may be started, each with a GPU as this one's, if this
            one is not connected with others yet.
        with_base: whether the base is opened, which has all its experts, whatever the config keeps.

    Raises:
        StageError: the largest model cannot fit on the GPUs or in host memory, or ranks that would
            share experts run on different machines.
    """
    global _decided
    shape = find_shape(config.model) if with_base else compressed_shape(config)
    place = _meet()
    if processes > 1:
        place = place._replace(firsts=[0] * processes, here=processes)
    if place.budget_bytes is None:
        held = _hold_on_cpu(config)
    else:
        held = _fit_evaluation(shape, config, place, place.budget_bytes)
    check_host(shape, config, held, place.here, place.host_bytes)
    _check_machines(place.firsts, held.expert_parallel)
    replicated, predicted = (
        sum(evaluation_memory(shape, config, place.device, each).values())
        for each in (Held(), held)
    )
    _decided = _describe(shape, config, place, held, replicated, predicted)
    return held


def _hold_on_cpu(config: Config) -> Held:
    asked = config.expert_parallel_degree
    placement = "host" if config.experts.placement == "host" else "gpu"
    return Held(1 if asked == "auto" else asked, placement)


def _fit_evaluation(shape: ModelShape, config: Config, place: _Places, budget_bytes: int) -> Held:
    """Return the planner's choice for stage 04; raise StageError if it does not fit."""
    held = decide_evaluation_held(shape, config, place.here, budget_bytes, "cuda", place.host_bytes)
    peak = sum(evaluation_memory(shape, config, "cuda", held).values())
    if peak <= budget_bytes * MARGIN:
        return held
    raise StageError(
        f"evaluating {config.model.base} does not fit in memory",
        f"at most {format_bytes(budget_bytes)} on each GPU",
        f"{format_bytes(peak)} by the plan, with experts and vocabulary "
        f"{describe_held(held, 'each GPU')}: {format_bytes(peak - budget_bytes)} short",
        "lower evaluation.batch_size, or use more or larger GPUs",
    )


class _Places(NamedTuple):
    """What the connected ranks have.

    Attributes:
        firsts: the first rank of each rank's machine.
        here: number of ranks of a machine; of several with different numbers, what divides all.
        budget_bytes: least memory of a GPU; None without GPUs.
        host_bytes: least host memory available on a machine.
    """

    firsts: list[int]
    here: int
    budget_bytes: int | None
    host_bytes: int

    @property
    def device(self) -> Literal["cuda", "cpu"]:
        """Kind of the ranks' devices."""
        return "cpu" if self.budget_bytes is None else "cuda"


def _meet() -> _Places:
    """Collect what every rank has."""
    on_gpu = torch.cuda.is_available()
    own = (*_place(), available_bytes() if on_gpu else None, host_memory()[1])
    firsts, counts, free, host = zip(*ranks.collect(own), strict=True)
    budget = min(free) if on_gpu else None
    return _Places(list(firsts), math.gcd(*counts), budget, min(host))


def available_bytes() -> int:
    """Return the current GPU's memory available to this process.

    It is the sum of free memory, torch's reserved memory and the CUDA context, which the planner
    counts too.
    """
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() + CONTEXT_BYTES


def _place() -> tuple[int, int]:
    """Return the first rank of this machine, and its number of ranks, by torchrun's variables."""
    rank, local = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    return rank - local, int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _check_machines(firsts: list[int], chosen: int) -> None:
    """Raise if consecutive ranks that would share experts run on different machines.

    Args:
        firsts: the first rank of each rank's machine.
        chosen: number of ranks that would share experts.
    """
    for start in range(0, len(firsts), chosen):
        group = firsts[start : start + chosen]
        if len(group) < chosen or len(set(group)) > 1:
            raise StageError(
                f"ranks {start} to {start + len(group) - 1} cannot share experts",
                f"groups of {chosen} consecutive ranks, each on one machine",
                f"{len(firsts)} ranks, whose machines begin at ranks "
                f"{', '.join(map(str, sorted(set(firsts))))}",
                "start a multiple of expert_parallel_degree processes on each machine, with "
                "consecutive ranks, or set another expert_parallel_degree",
            )
