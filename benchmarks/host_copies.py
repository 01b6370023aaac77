"""Copies of experts from host memory: a step without them, they without a step, and slower ones.

They are those of `sparselong.model.host_experts`, which is what stage 03 runs. Here one of its
functions, the one that starts a layer's copy, is replaced for the length of a block:

    recording   copies as usual, and notes which layer went into which buffer
    leaving_out copies nothing: kernels compute with what the two buffers hold, random weights like
                those of any other layer, so a step does the same work
    slowing     copies a layer in pieces, and lets the copies' stream wait after each, so that no
                more than a given number of bytes a second arrive

`replay` then makes a step's recorded copies again, one after another, with nothing beside them.

The wait is a kernel of one thread that counts cycles. If the GPU's clock is slower beside a step
than it was at calibration, copies are slower than asked, never faster.
"""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch

from sparselong.model.host_experts import HostExperts

PIECE_BYTES = 128 << 20
"""Bytes that are copied between two waits."""
Copies = list[tuple[int, int]]
"""Layers and the buffers into which they are copied, in order."""


@contextmanager
def recording(host: HostExperts) -> Iterator[Copies]:
    """Note every copy that begins inside the block."""
    made: Copies = []
    copy = host._copy

    def record(layer: int, number: int) -> None:
        copy(layer, number)
        made.append((layer, number))

    with mock.patch.object(host, "_copy", record):
        yield made


@contextmanager
def leaving_out(host: HostExperts) -> Iterator[None]:
    """Let layers count as copied inside the block although nothing is; afterwards none is there."""

    def pretend(layer: int, number: int) -> None:
        host._held[number] = host._key(layer)

    try:
        with mock.patch.object(host, "_copy", pretend):
            yield
    finally:
        host._held[:] = [None, None]


@contextmanager
def slowing(host: HostExperts, cycles: int) -> Iterator[None]:
    """Copy layers in pieces inside the block; after a whole piece, wait for some cycles."""

    def copy(layer: int, number: int) -> None:
        assert host._slots is not None
        slot, source, (stream,) = host._slots[number], host.layers[layer], host._streams
        host._held[number] = None
        stream.wait_stream(torch.cuda.current_stream(host.device))
        pieces = zip(slot.whole.split(PIECE_BYTES), source.split(PIECE_BYTES), strict=True)
        with torch.cuda.stream(stream):
            for to, piece in pieces:
                to.copy_(piece, non_blocking=True)
                torch.cuda._sleep(max(1, cycles * piece.nbytes // PIECE_BYTES))
        assert slot.ready is not None
        slot.ready.record(stream)
        host._held[number] = host._key(layer)
        host.copied_bytes += source.nbytes

    with mock.patch.object(host, "_copy", copy):
        yield


def replay(host: HostExperts, copies: Copies) -> float:
    """Make these copies, one after another, and return the seconds that they took."""
    _finish(host)
    begin = time.perf_counter()
    for layer, number in copies:
        host._copy(layer, number)
    _finish(host)
    return time.perf_counter() - begin


def find_cycles(host: HostExperts, bytes_per_second: float) -> int:
    """Return for how many cycles to wait after each piece so that copies have this rate.

    0 if they are not faster anyway.
    """
    copies = [(number % len(host.layers), number % 2) for number in range(4)]
    pieces = len(copies) * host.layer_bytes / PIECE_BYTES
    wanted = len(copies) * host.layer_bytes / bytes_per_second
    rate, cycles = _count_cycles(), 0.0
    for _ in range(3):
        with slowing(host, int(cycles)):
            took = replay(host, copies)
        cycles = max(0.0, cycles + (wanted - took) * rate / pieces)
    return math.ceil(cycles)


def _count_cycles() -> float:
    """Return the cycles that the GPU counts in a second."""
    cycles, seconds = 200_000_000, 0.0
    for _ in range(2):  # the first lets the clock rise
        torch.cuda.synchronize()
        begin = time.perf_counter()
        torch.cuda._sleep(cycles)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    return cycles / seconds


def _finish(host: HostExperts) -> None:
    if host.device.type == "cuda":
        torch.cuda.synchronize(host.device)


def measure_parts(
    host: HostExperts,
    step: Callable[[], Any],
    wait: Callable[[], Any],
    rounds: int,
    bytes_per_second: float | None = None,
) -> dict[str, float]:
    """Return the seconds of a step, of its computation alone and of its copies alone, and bytes.

    Steps with copies come first, then the same copies by themselves, then steps without copies;
    medians are returned. Every step begins with the same layers on the GPU, as in a row of steps.

    Args:
        host: the experts.
        step: makes a step and waits until the GPU is done.
        wait: waits for the other processes, before whatever is timed.
        rounds: number of turns.
        bytes_per_second: rate of the copies; None: as fast as they go.
    """
    cycles = 0 if bytes_per_second is None else find_cycles(host, bytes_per_second)
    seconds: dict[str, list[float]] = {"step": [], "compute": [], "copies": []}
    made: Copies = []
    with nullcontext() if bytes_per_second is None else slowing(host, cycles):
        for number in range(1 + rounds):  # after the first, the first two layers are on the GPU
            wait()
            with recording(host) as made:
                taken = _time(step)
            if number:
                seconds["step"].append(taken)
        for _ in range(rounds):
            wait()
            seconds["copies"].append(replay(host, made))
    with leaving_out(host):
        for number in range(1 + rounds):
            wait()
            taken = _time(step)
            if number:
                seconds["compute"].append(taken)
    whole, compute, copies = map(statistics.median, seconds.values())
    copied = len(made) * host.layer_bytes
    return {
        "streamed_step_seconds": whole,
        "compute_alone_seconds": compute,
        "copies_alone_seconds": copies,
        "copied_bytes": copied,
        "copies_rate": copied / copies,
        "over_longest": whole / max(compute, copies),
        "over_copies": whole / copies,
    }


def _time(step: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def host_memory(host: HostExperts | None) -> dict[str, float]:
    """Return a process's largest resident host memory so far, and the experts' share of it."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    experts = 0 if host is None else host.layer_bytes * len(host.layers)
    return {
        "host_peak_bytes": peak,
        "host_expert_bytes": experts,
        "host_rest_bytes": peak - experts,
    }
