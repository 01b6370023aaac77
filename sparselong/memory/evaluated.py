"""Stage 04: its memory with experts held in each way, the chosen way, and its answers' seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from sparselong.config import Config
from sparselong.figures import format_bytes
from sparselong.memory import placing, stages
from sparselong.memory.labels import label
from sparselong.memory.shape import ModelShape
from sparselong.memory.storage import WHOLE, Held, expert_bytes
from sparselong.memory.training import Device
from sparselong.memory.ways import explain_held, list_ways

if TYPE_CHECKING:
    from sparselong.memory.timing import Rate

EFFORTS = 3
"""Reasoning efforts with which each fixed question is asked (data.EFFORTS)."""
DECODE_SHARE = 0.43
"""Fraction of a GPU's bandwidth at which a token's weights are read (generation)."""
DECODE_LAYER_SECONDS = 0.0002
"""What a layer takes for a token without a CUDA graph, as in several processes (generation)."""


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


def answer_seconds(
    shape: ModelShape, config: Config, rate: Rate, gpus: int = 1, held: Held = WHOLE
) -> float:
    """Return the seconds in which a model answers stage 04's fixed questions, at most.

    Each answer is counted with `evaluation.health_tokens`, in compressed weights. What processes
    exchange for a token is not counted, nor are answers to tasks.

    Args:
        shape: sizes of the base model.
        config: the config of the run.
        rate: speed of the device.
        gpus: number of GPUs that compute.
        held: how stage 04 holds the experts.
    """
    experts = shape.active - shape.embedding - shape.attention_weights
    read = 2 * shape.embedding + shape.attention_weights / 2 + 17 / 32 * experts
    layer_seconds = max(rate.decode_layer_seconds, DECODE_LAYER_SECONDS if gpus > 1 else 0.0)
    token = max(read / (DECODE_SHARE * rate.memory_bytes_per_second), shape.layers * layer_seconds)
    if held.placement == "host":  # every token copies all of them
        copied = expert_bytes(shape) / held.expert_parallel
        token = max(token, copied / rate.copied_bytes_per_second)
    evaluation = config.evaluation
    tokens = evaluation.health_prompts * EFFORTS * evaluation.health_tokens
    return tokens * token / max(1, gpus // held.expert_parallel)
