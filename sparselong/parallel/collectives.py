"""The two collectives of this package, all-to-all and all-gather, with counters of sent bytes.

Sums over ranks are built from them and added in rank order in fp32, because a library's all-reduce
chooses its order by message size and topology. So sums are the same bits on every rank and in every
run.

`count_bytes` counts the bytes that this process sends to *other* ranks, by tag, at the call that
sends them. Traffic figures in tests and benchmarks are therefore measured, never derived.

A failing collective raises ExchangeError instead of the backend's own error, which names addresses
but no ranks; `processes/watch.py` finds the rank by each one's number of begun exchanges.
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
    """An exchange with other ranks failed because one of them failed."""


class _Progress:
    """Number of exchanges that this process has begun, and the tag of the last one."""

    begun, tag = 0, "none"


def progress() -> tuple[int, str]:
    """Return the number of exchanges that this process has begun, and the last one's tag."""
    return _Progress.begun, _Progress.tag


_counters: list[Counter[str]] = []


@contextmanager
def count_bytes() -> Iterator[Counter[str]]:
    """Count the bytes sent to other ranks inside the block, by tag."""
    counter: Counter[str] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


class Pending:
    """A running collective. On a GPU `wait` blocks only the current stream, not the host."""

    def __init__(self, work: Any, sent: torch.Tensor, received: torch.Tensor, tag: str):
        self._work, self._sent, self._received, self._tag = work, sent, received, tag

    def wait(self) -> torch.Tensor:
        """Return the received rows.

        Raises:
            ExchangeError: a rank is gone, or did not take part in time.
        """
        explain_exchange(self._tag, self._work.wait)
        return self._received


def start_all_to_all(
    rows: torch.Tensor, sent_rows: list[int], received_rows: list[int], group: Group, tag: str
) -> Pending:
    """Send the first `sent_rows[0]` rows to the group's rank 0, the next to rank 1, and so on.

    Args:
        rows: [sum(sent_rows), ...], contiguous; must not be modified before `wait`.
        sent_rows: number of rows to send to each rank of the group.
        received_rows: number of rows to receive from each rank of the group.
        group: the process group.
        tag: the tag under which `count_bytes` counts.

    Returns:
        The running exchange of [sum(received_rows), ...], in rank order.

    Raises:
        ExchangeError: a rank is gone, or did not take part in time.
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


def start_all_gather(tensor: torch.Tensor, group: Group, tag: str) -> Pending:
    """Send this rank's tensor to every rank; all must have the same shape and dtype.

    Args:
        tensor: contiguous, on the group's device; must not be modified before `wait`.
        group: the process group, of P ranks.
        tag: the tag under which `count_bytes` counts.

    Returns:
        The running exchange of [P, *tensor.shape], in rank order.

    Raises:
        ExchangeError: a rank is gone, or did not take part in time.
    """
    _begin(tag)
    size = dist.get_world_size(group)
    record_bytes(tensor.numel() * tensor.element_size() * (size - 1), tag)
    received = tensor.new_empty(size, *tensor.shape)
    # torch 2.13 renamed it; 2.11 knows only the old name.
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def start() -> Any:
        # Flat, because gloo takes only an output whose first axis is `size` times the input's.
        return gather(received.view(-1), tensor.view(-1), group=group, async_op=True)

    return Pending(explain_exchange(tag, start), tensor, received, tag)


def all_gather(tensor: torch.Tensor, group: Group, tag: str) -> list[torch.Tensor]:
    """Gather every rank's tensor, in rank order; all must have the same shape and dtype.

    If the group has only NCCL, a CPU tensor is gathered on the GPU.

    Raises:
        ExchangeError: a rank is gone, or did not take part in time.
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
    """Sum a small tensor over the group in rank order: the same bits on every rank."""
    total, *others = all_gather(tensor, group, tag)
    for other in others:
        total += other
    return total


def sum_in_slices(tensor: torch.Tensor, group: Group, tag: str) -> torch.Tensor:
    """Sum a large 1-d tensor over the group in its own dtype and in rank order.

    Each rank sums one slice of all ranks' tensors and sends the sum to all ranks: as many bytes as
    an all-reduce sends.
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
    """Add bytes that are being sent to other ranks to every active counter."""
    for counter in _counters:
        counter[tag] += size_bytes


def _begin(tag: str) -> None:
    _Progress.begun, _Progress.tag = _Progress.begun + 1, tag


def explain_exchange(tag: str, call: Callable[[], Any]) -> Any:
    """Return the result of a torch.distributed call, turning its errors into ExchangeError.

    Args:
        tag: the exchange's tag, for the message.
        call: makes the call.

    Raises:
        ExchangeError: a rank is gone, or did not take part in time.
        torch.OutOfMemoryError: this rank has no memory for the exchange.
    """
    try:
        return call()
    except torch.OutOfMemoryError:  # this rank's own failure, not one of the exchange
        raise
    except RuntimeError as error:  # torch.distributed raises this for every backend failure
        first = str(error).strip().split("\n")[0]
        raise ExchangeError(
            f"rank {dist.get_rank()} could not finish the exchange '{tag}' with the other ranks",
            "every rank alive and at the same exchange within the timeout",
            f"{type(error).__name__}: {first[:300]}",
            "look for the rank that ended first and its message; start again from the last "
            "checkpoint",
            consequence=True,
        ) from error
