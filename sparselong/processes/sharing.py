"""Decide how many ranks share one copy of experts and vocabulary, and record why.

Ranks of an expert group exchange rows in every pass, so all ranks must decide the same: the rank
with the least memory decides. Only ranks of one machine may share, because a layer's exchange moves
far more bytes than the gradients of a step.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch

from sparselong.config import Config
from sparselong.errors import StageError
from sparselong.memory import (
    CONTEXT_BYTES,
    MARGIN,
    check_fit,
    decide_evaluation_parallel,
    decide_expert_parallel,
    decided_memory,
    evaluation_memory,
    find_shape,
    format_bytes,
)
from sparselong.processes import world as ranks


@dataclass(frozen=True)
class Sharing:
    """The decision on `expert_parallel_degree`, as recorded in receipt and manifest.

    Attributes:
        asked: `auto` or a number.
        chosen: number of ranks that share one copy of experts and vocabulary; 1: each holds all.
        replicated_peak_bytes: the planner's peak of a rank if each holds all.
        predicted_peak_bytes: the planner's peak of a rank with the chosen number.
        available_bytes: least memory of a GPU available to its rank; None without GPUs.
    """

    asked: int | str
    chosen: int
    replicated_peak_bytes: int
    predicted_peak_bytes: int
    available_bytes: int | None

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
        return text


_decided: Sharing | None = None


def decided_sharing() -> Sharing | None:
    """Return this process's last decision, for stage 03 or 04; None before the first."""
    return _decided


def decide_sharing(config: Config) -> Sharing:
    """Decide on `expert_parallel_degree`; every connected rank must call this before it joins.

    On a CPU `auto` is 1: its memory is not known to be this process's own.

    Args:
        config: the run's config.

    Raises:
        StageError: fine-tuning cannot fit on the GPUs, the experts cannot be split evenly, or ranks
            that would share experts run on different machines.
    """
    global _decided
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    shape, asked = find_shape(config.model), config.expert_parallel_degree
    places = ranks.collect((*_place(), available_bytes() if on_gpu else None))
    here = math.gcd(*(count for _, count, _ in places))
    budget = min(free for *_, free in places) if on_gpu else None
    if budget is None:
        chosen = 1 if asked == "auto" else asked
    else:
        check_fit(shape, config, here, budget, device)
        chosen = decide_expert_parallel(shape, config, here, budget, device)
    _check_machines([first for first, *_ in places], chosen)
    replicated, predicted = (
        decided_memory(shape, config, budget or 0, device, expert_parallel=degree).peak_bytes
        for degree in (1, chosen)
    )
    _decided = Sharing(asked, chosen, replicated, predicted, budget)
    return _decided


def decide_evaluation_sharing(config: Config) -> int:
    """Return how many ranks share experts and vocabulary in stage 04; called as `decide_sharing`.

    Raises:
        StageError: the largest model cannot fit on the GPUs, or ranks that would share experts run
            on different machines.
    """
    global _decided
    on_gpu, asked = torch.cuda.is_available(), config.expert_parallel_degree
    places = ranks.collect((*_place(), available_bytes() if on_gpu else None))
    budget = min(free for *_, free in places) if on_gpu else None
    if budget is None:
        chosen = 1 if asked == "auto" else asked
    else:
        here = math.gcd(*(count for _, count, _ in places))
        chosen = _fit_evaluation(config, here, budget)
    _check_machines([first for first, *_ in places], chosen)
    shape, device = find_shape(config.model), "cuda" if on_gpu else "cpu"
    replicated, predicted = (
        sum(evaluation_memory(shape, config, device, degree).values()) for degree in (1, chosen)
    )
    _decided = Sharing(asked, chosen, replicated, predicted, budget)
    return chosen


def _fit_evaluation(config: Config, here: int, budget_bytes: int) -> int:
    """Return the planner's choice for stage 04; raise StageError if it does not fit."""
    shape = find_shape(config.model)
    chosen = decide_evaluation_parallel(shape, config, here, budget_bytes, "cuda")
    peak = sum(evaluation_memory(shape, config, "cuda", chosen).values())
    if peak <= budget_bytes * MARGIN:
        return chosen
    how = f"shared by {chosen} processes" if chosen > 1 else "whole on each GPU"
    raise StageError(
        f"evaluating {config.model.base} does not fit in memory",
        f"at most {format_bytes(budget_bytes)} on each GPU",
        f"{format_bytes(peak)} by the plan, with experts and vocabulary {how}: "
        f"{format_bytes(peak - budget_bytes)} short",
        "lower evaluation.batch_size, or use more or larger GPUs",
    )


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
