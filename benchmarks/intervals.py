"""When a GPU's kernels run: compute and collectives, and how much of the latter is hidden."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Interval = tuple[float, float]


def measure_overlap(step: Callable[[], Any], layers: int) -> dict[str, float]:
    """Profile one step on this rank.

    Every rank must profile its step at the same time, since profiling slows it down.

    Args:
        step: makes the step.
        layers: the model's layers, for the number of launches per layer.

    Returns:
        Seconds in which any kernel but NCCL's runs, in which NCCL's run, and in which both do; the
        hidden share of the collectives; launches, in all and per layer.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    compute: list[Interval] = []
    collective: list[Interval] = []
    launches = 0
    for event in trace.events():
        if event.device_type != torch.autograd.DeviceType.CUDA or event.is_user_annotation:
            continue
        launches += 1
        span = (event.time_range.start, event.time_range.end)
        (collective if "nccl" in event.name.lower() else compute).append(span)
    busy, sending = merge(compute), merge(collective)
    both = overlap(busy, sending)
    return {
        "compute_seconds": length(busy) / 1e6,
        "collective_seconds": length(sending) / 1e6,
        "hidden_seconds": both / 1e6,
        "hidden_share": both / length(sending) if sending else 1.0,
        "launches": launches,
        "launches_per_layer": launches / layers,
    }


def merge(spans: list[Interval]) -> list[Interval]:
    """Return the union of intervals as sorted intervals that do not touch."""
    merged: list[Interval] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def length(spans: list[Interval]) -> float:
    """Return the total length of intervals that do not overlap."""
    return sum(end - begin for begin, end in spans)


def overlap(one: list[Interval], other: list[Interval]) -> float:
    """Return the length of the intersection of two unions from `merge`."""
    total, place = 0.0, 0
    for begin, end in one:
        while place < len(other) and other[place][1] <= begin:
            place += 1
        at = place
        while at < len(other) and other[at][0] < end:
            total += min(end, other[at][1]) - max(begin, other[at][0])
            at += 1
    return total
