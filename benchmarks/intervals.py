"""When a GPU's kernels run: compute, collectives, copies from and to the host; what is hidden."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

from sparselong.parallel.collectives import progress

Interval = tuple[float, float]
Tags = dict[str, list[str]]
"""Tags of NCCL's collectives in order, by the part of a kernel's name that tells their kind."""
_KINDS = {
    "all_to_all_single": "SendRecv",
    "all_gather": "AllGather",
    "all_gather_single": "AllGather",
    "all_gather_into_tensor": "AllGather",
}


class Profile(NamedTuple):
    """One profiled step on this rank.

    Attributes:
        compute: the union of the intervals in which any kernel but NCCL's runs, or a copy on the
            GPU.
        collectives: NCCL's kernels, by tag in the order of their calls; empty if they cannot be
            told apart (several groups).
        sending: the union of NCCL's kernels' intervals.
        launches: number of kernels and copies.
        copying: the union of the intervals of copies between host memory and the GPU.
    """

    compute: list[Interval]
    collectives: dict[str, list[Interval]]
    sending: list[Interval]
    launches: int
    copying: Sequence[Interval] = ()

    def summarize(self, layers: int) -> dict[str, float]:
        """Return seconds of both kinds of kernels and launches.

        Args:
            layers: the model's layers, for the number of launches per layer.

        Returns:
            Seconds in which any kernel but NCCL's runs, in which NCCL's run, and in which both do;
            the hidden share of the collectives, in all and by tag; seconds of copies between host
            memory and the GPU; launches, in all and per layer.
        """
        both = overlap(self.compute, self.sending)
        found = {
            "compute_seconds": length(self.compute) / 1e6,
            "collective_seconds": length(self.sending) / 1e6,
            "hidden_seconds": both / 1e6,
            "hidden_share": both / length(self.sending) if self.sending else 1.0,
            "host_copy_seconds": length(self.copying) / 1e6,
            "launches": self.launches,
            "launches_per_layer": self.launches / layers,
        }
        for tag, spans in self.collectives.items():
            mine = merge(spans)
            found[f"collective_seconds: {tag}"] = length(mine) / 1e6
            found[f"hidden_seconds: {tag}"] = overlap(self.compute, mine) / 1e6
        return found

    def calls(self) -> list[tuple[float, float]]:
        """Return every collective's microseconds, and how many of them are hidden.

        They are in the order of tags and calls, which is the same on all ranks.
        """
        spans = (each for tag in sorted(self.collectives) for each in self.collectives[tag])
        return [(end - begin, overlap(self.compute, [(begin, end)])) for begin, end in spans]


def sum_transfers(calls: torch.Tensor) -> dict[str, float]:
    """Return the seconds of the transfers alone, and how much of them is hidden.

    A collective's kernel waits for the last rank before it transfers anything. The last rank's own
    kernel is the shortest, and all of it is transfer.

    Args:
        calls: [ranks, calls, 2], every rank's `Profile.calls`.
    """
    last = calls[:, :, 0].argmin(0)
    whole, hidden = calls[last, torch.arange(calls.shape[1])].sum(0).tolist()
    return {
        "transfer_seconds": whole / 1e6,
        "hidden_transfer_seconds": hidden / 1e6,
        "hidden_transfer_share": hidden / whole,
    }


def profile_step(step: Callable[[], Any]) -> Profile:
    """Profile one step on this rank.

    Every rank must profile its step at the same time, since profiling slows it down.
    """
    from torch.profiler import ProfilerActivity, profile

    with recording_tags() as tags, profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    compute: list[Interval] = []
    copies: list[Interval] = []
    collective: list[tuple[str, Interval]] = []
    for event in trace.events():
        if event.device_type != torch.autograd.DeviceType.CUDA or event.is_user_annotation:
            continue
        span = (event.time_range.start, event.time_range.end)
        if "nccl" in event.name.lower():
            collective.append((event.name, span))
        elif "HtoD" in event.name or "DtoH" in event.name:
            copies.append(span)
        else:
            compute.append(span)
    sending = merge([span for _, span in collective])
    launches = len(compute) + len(collective) + len(copies)
    copying = merge(copies)
    return Profile(merge(compute), assign(collective, tags), sending, launches, copying)


@contextmanager
def recording_tags() -> Iterator[Tags]:
    """Record the tag of every collective of GPU tensors that begins inside the block."""
    tags: Tags = {kind: [] for kind in _KINDS.values()}
    inside: list[str] = []

    def record(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def recording(received: Any, sent: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if sent.is_cuda and not inside:  # one function may call another of them
                tags[_KINDS[name]].append(progress()[1])
            inside.append(name)
            try:
                return call(received, sent, *args, **kwargs)
            finally:
                inside.pop()

        return recording

    with ExitStack() as stack:
        for name in _KINDS:
            if hasattr(dist, name):
                made = record(name, getattr(dist, name))
                stack.enter_context(mock.patch.object(dist, name, made))
        yield tags


def assign(kernels: list[tuple[str, Interval]], tags: Tags) -> dict[str, list[Interval]]:
    """Return the intervals of NCCL's kernels by tag.

    A kind's kernels run in the order of their calls if all belong to one group. An empty dict is
    returned if their number is not that of the calls.

    Args:
        kernels: names and intervals.
        tags: from `recording_tags`.
    """
    found: dict[str, list[Interval]] = defaultdict(list)
    for kind, called in tags.items():
        spans = sorted(span for name, span in kernels if kind in name)
        if len(spans) != len(called):
            return {}
        for tag, span in zip(called, spans, strict=True):
            found[tag].append(span)
    return found


def merge(spans: list[Interval]) -> list[Interval]:
    """Return the union of intervals as sorted intervals that do not touch."""
    merged: list[Interval] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def length(spans: Sequence[Interval]) -> float:
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
