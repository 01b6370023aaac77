"""Stage 04's memory with experts held in each way, which way is chosen, and why."""

from __future__ import annotations

from typing import Any, NamedTuple

from sparselong.config import Config
from sparselong.figures import format_bytes
from sparselong.memory import placing, stages
from sparselong.memory.labels import label
from sparselong.memory.shape import ModelShape
from sparselong.memory.storage import Held
from sparselong.memory.training import Device
from sparselong.memory.ways import explain_held, list_ways


class Evaluation(NamedTuple):
    """Stage 04 in a plan.

    Attributes:
        ways: bytes on each device by component, with experts held in each way; None: not allowed.
        held: how they are held.
        reason: why so.
        peak_bytes: peak on each device, held so.
        host_bytes: host memory of the processes if experts are there, else 0.
    """

    ways: dict[str, dict[str, int] | None]
    held: Held
    reason: str
    peak_bytes: int
    host_bytes: int

    def columns(self) -> dict[str, Any]:
        """Return the part of a plan's JSON document that compares the ways."""
        found: dict[str, Any] = {
            "expert_parallel_degree": self.held.expert_parallel,
            "expert_placement": self.held.placement,
            "held_reason": self.reason,
            "expert_host_bytes": self.host_bytes,
        }
        for way, components in self.ways.items():
            found[f"{way}_bytes_per_gpu"] = label(components) if components else None
            peak = sum(components.values()) if components else None
            found[f"{way}_peak_bytes_per_gpu"] = peak
        return found

    def remedies(self, budget_bytes: int) -> list[str]:
        """Return what to change if the chosen way does not fit."""
        shared = self.ways["sharded"]
        if self.held == Held() and shared and sum(shared.values()) <= budget_bytes:
            saved = format_bytes(self.peak_bytes - sum(shared.values()))
            return [f"expert_parallel_degree=auto saves {saved} and fits"]
        return ["lower evaluation.batch_size, or use more or larger GPUs"]


def plan_evaluation(
    shape: ModelShape, config: Config, held: Held, budget_bytes: int, device: Device
) -> Evaluation:
    """Plan stage 04 in each way for the fewest processes with which stage 03 can run.

    Args:
        shape: sizes of the base model.
        config: the config of the run.
        held: how stage 04 holds experts.
        budget_bytes: usable memory of each device.
        device: kind of the devices.
    """
    ways = {
        way: None if each is None else stages.evaluation_memory(shape, config, device, each)
        for way, each in list_ways(shape, config, held, device).items()
    }
    whole = stages.evaluation_memory(shape, config, device, Held())
    reason = explain_held(shape, config, held, sum(whole.values()), budget_bytes)
    chosen = stages.evaluation_memory(shape, config, device, held)
    processes = placing.planned_processes(config)
    is_on_host = held.placement == "host"
    host_bytes = placing.host_bytes(shape, config, held, processes) if is_on_host else 0
    return Evaluation(ways, held, reason, sum(chosen.values()), host_bytes)
