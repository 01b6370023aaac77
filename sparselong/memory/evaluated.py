"""Stage 04 in a plan: its memory with and without shared experts, which it chooses, and why."""

from __future__ import annotations

from typing import Any, NamedTuple

from sparselong.config import Config
from sparselong.memory import fit, stages
from sparselong.memory.labels import label
from sparselong.memory.shape import ModelShape
from sparselong.memory.table import format_bytes
from sparselong.memory.training import Device


class Evaluation(NamedTuple):
    """Stage 04's memory on each device, by component.

    Attributes:
        replicated: with all experts and the whole vocabulary on each device.
        sharded: if processes share them, as many as can; None if only one could.
        degree: number of processes that share them.
        reason: why that number.
    """

    replicated: dict[str, int]
    sharded: dict[str, int] | None
    degree: int
    reason: str

    @property
    def peaks(self) -> tuple[int, int | None]:
        """Peak with replicated and with shared experts and vocabulary, in bytes."""
        shared = sum(self.sharded.values()) if self.sharded else None
        return sum(self.replicated.values()), shared

    def to_dict(self) -> dict[str, Any]:
        """Return the part of a plan's JSON document that compares the two."""
        replicated, sharded = self.peaks
        return {
            "expert_parallel_degree": self.degree,
            "expert_parallel_reason": self.reason,
            "replicated_bytes_per_gpu": label(self.replicated),
            "replicated_peak_bytes_per_gpu": replicated,
            "sharded_bytes_per_gpu": label(self.sharded) if self.sharded else None,
            "sharded_peak_bytes_per_gpu": sharded,
        }

    def remedies(self, budget_bytes: int) -> list[str]:
        """Return what to change if the chosen one does not fit."""
        replicated, sharded = self.peaks
        if self.degree == 1 and sharded is not None and sharded <= budget_bytes:
            saved = format_bytes(replicated - sharded)
            return [f"expert_parallel_degree=auto saves {saved} and fits"]
        return ["lower evaluation.batch_size, or use more or larger GPUs"]


def plan_evaluation(
    shape: ModelShape, config: Config, budget_bytes: int, device: Device
) -> Evaluation:
    """Plan stage 04 for the fewest processes with which stage 03 can run."""
    processes = fit.planned_processes(config)
    most = most_planned(shape, config)
    degree = fit.decide_evaluation_parallel(shape, config, processes, budget_bytes, device)
    replicated = stages.evaluation_memory(shape, config, device)
    sharded = stages.evaluation_memory(shape, config, device, most) if most > 1 else None
    peak = sum(replicated.values())
    reason = give_reason(shape, config, degree, peak, budget_bytes)
    return Evaluation(replicated, sharded, degree, reason)


def most_planned(shape: ModelShape, config: Config) -> int:
    """Return how many processes share experts and vocabulary in the sharded column of a plan."""
    asked = config.expert_parallel_degree
    if asked != "auto" and asked > 1:
        return asked
    return fit.most_expert_parallel(shape, config, fit.planned_processes(config))


def give_reason(
    shape: ModelShape, config: Config, chosen: int, replicated_bytes: int, budget_bytes: int
) -> str:
    """Return why `chosen` processes share experts and vocabulary.

    Args:
        shape: sizes of the base model.
        config: the config of the run.
        chosen: the choice.
        replicated_bytes: the stage's peak on a device if each process holds all.
        budget_bytes: usable memory of the device.
    """
    asked, processes = config.expert_parallel_degree, fit.planned_processes(config)
    if asked != "auto":
        return f"expert_parallel_degree: {asked}"
    if processes == 1:
        return "auto: one process holds them all"
    if config.training.keep_experts == "always":
        return "auto: training.keep_experts: always needs all of them on each GPU"
    if fit.most_expert_parallel(shape, config, processes) == 1:
        return f"auto: {processes} processes cannot share {shape.experts} experts"
    outcome = "fits" if chosen == 1 else "does not fit with a margin"
    return (
        f"auto: replicated, {format_bytes(replicated_bytes)} of {format_bytes(budget_bytes)}, "
        f"{outcome}"
    )
