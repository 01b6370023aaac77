"""The two collectives that everything here is made of, and what they send, counted.

All-to-all and all-gather are enough. A sum over ranks is made from them and added in rank order in
fp32, because a library's all-reduce chooses its order by message size and topology; so sums are the
same bits on every rank and in every run.

`count_bytes` counts what this process hands over for *other* ranks, at the call that hands it over,
by tag: no figure about traffic in tests or benchmarks comes from a formula.

A collective that fails raises ExchangeError in place of the backend's own error, which names
addresses and no ranks; `processes/watch.py` finds out which rank it was, by how far each has come.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from sparselong.errors import StageError

Group = dist.ProcessGroup


class ExchangeError(StageError):
    """An exchange with other ranks did not come to its end: one of them has failed."""


class _Progress:
    """How many exchanges this process has begun, and what the last one was."""

    begun, tag = 0, "none"


def progress() -> tuple[int, str]:
    """Exchanges begun by this process since it started, and the last one's tag."""
    return _Progress.begun, _Progress.tag


_counters: list[Counter[str]] = []


@contextmanager
def count_bytes() -> Iterator[Counter[str]]:
    """Bytes sent to other ranks by tag, from here to the end of the block."""
    counter: Counter[str] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


class Pending:
    """A collective under way; `wait` gives its result, and on a GPU lets only the stream wait."""

    def __init__(self, work: Any, sent: torch.Tensor, received: torch.Tensor, tag: str):
        self._work, self._sent, self._received, self._tag = work, sent, received, tag

    def wait(self) -> torch.Tensor:
        """What was received.

        Raises:
            ExchangeError: a rank has gone, or did not take part in time.
        """
        explain_exchange(self._tag, self._work.wait)
        return self._received


def start_all_to_all(
    rows: torch.Tensor, sent_rows: list[int], received_rows: list[int], group: Group, tag: str
) -> Pending:
    """Sends the first `sent_rows[0]` rows to the group's rank 0, the next to rank 1, and so on.

    Args:
        rows: [sum(sent_rows), ...], contiguous; must not be written to before `wait`.
        sent_rows, received_rows: by rank of the group.
        tag: under which `count_bytes` counts.

    Returns:
        Pending of [sum(received_rows), ...], by rank of the group.

    Raises:
        ExchangeError: a rank has gone, or did not take part in time.
    """
    _begin(tag)
    others = sum(sent_rows) - sent_rows[dist.get_rank(group)]
    record_bytes(others * math.prod(rows.shape[1:]) * rows.element_size(), tag)
    received = rows.new_empty(sum(received_rows), *rows.shape[1:])

    def start() -> Any:
        return dist.all_to_all_single(
            received, rows, received_rows, sent_rows, group=group, async_op=True
        )

    return Pending(explain_exchange(tag, start), rows, received, tag)


def all_gather(tensor: torch.Tensor, group: Group, tag: str) -> list[torch.Tensor]:
    """Every rank's tensor, which all have the same shape and type, by rank of the group.

    A tensor of the CPU travels through the GPU where the group has NCCL only.

    Raises:
        ExchangeError: a rank has gone, or did not take part in time.
    """
    _begin(tag)
    tensor = tensor.contiguous()
    if tensor.device.type == "cpu" and dist.get_backend(group) == "nccl":
        tensor = tensor.cuda()
    size = dist.get_world_size(group)
    record_bytes(tensor.numel() * tensor.element_size() * (size - 1), tag)
    gathered = [torch.empty_like(tensor) for _ in range(size)]
    explain_exchange(tag, lambda: dist.all_gather(gathered, tensor, group=group))
    return gathered


def sum_over_ranks(tensor: torch.Tensor, group: Group, tag: str) -> torch.Tensor:
    """The sum of a small tensor over the group, added in rank order: the same bits everywhere."""
    total, *others = all_gather(tensor, group, tag)
    for other in others:
        total += other
    return total


def sum_in_slices(tensor: torch.Tensor, group: Group, tag: str) -> torch.Tensor:
    """The sum of a large 1-d tensor over the group, in its own type, added in rank order.

    Each rank adds one slice of all ranks' tensors and hands the sum to all: an all-reduce's bytes.
    """
    size = dist.get_world_size(group)
    if size == 1:
        return tensor
    padded = torch.nn.functional.pad(tensor, (0, -len(tensor) % size))
    share = len(padded) // size
    pending = start_all_to_all(padded, [share] * size, [share] * size, group, tag)
    total, *others = pending.wait().view(size, share)
    total = total.clone()
    for other in others:
        total += other
    return torch.cat(all_gather(total, group, tag))[: len(tensor)]


def record_bytes(size_bytes: int, tag: str) -> None:
    """Counts bytes that are being handed over for other ranks."""
    for counter in _counters:
        counter[tag] += size_bytes


def _begin(tag: str) -> None:
    _Progress.begun, _Progress.tag = _Progress.begun + 1, tag


def explain_exchange(tag: str, call: Callable[[], Any]) -> Any:
    """Return what an exchange of torch.distributed returns.

    Raises:
        ExchangeError: a rank has gone, or did not take part in time.
    """
    try:
        return call()
    except RuntimeError as error:  # what torch.distributed raises for every failure of a backend
        first = str(error).strip().split("\n")[0]
        raise ExchangeError(
            f"rank {dist.get_rank()} could not finish the exchange '{tag}' with the other ranks",
            "every rank alive and at the same exchange within the time-out",
            f"{type(error).__name__}: {first[:300]}",
            "look for the rank that ended first and its own message; start again from the last "
            "checkpoint",
            consequence=True,
        ) from error
