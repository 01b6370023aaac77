"""Which process does what: data parallel times context parallel.

Process p works on sequence number p // context_size of a step (its data rank) and on shard
p % context_size of it (its context rank). Ranks of one context group are contiguous: on several
machines a sequence stays on one of them, and the gradients' one exchange a step goes between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class Mesh:
    """This process's place.

    Attributes:
        context_rank, context_size: its shard of the sequence, and how many there are.
        data_rank, data_size: its sequence of a step, and how many there are.
        context_group: the processes that share its sequence.
        data_group: the processes that hold the same shard of other sequences.
        world_group: all of them.
    """

    context_rank: int
    context_size: int
    data_rank: int
    data_size: int
    context_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    world_group: dist.ProcessGroup


def build_mesh(context_size: int, timeout: timedelta | None = None) -> Mesh:
    """The mesh of all processes; every one of them must call this, with the same arguments.

    Args:
        context_size: processes that share one sequence.
        timeout: how long an exchange may take; None: the backend's own default.

    Raises:
        ValueError: torch.distributed is not initialised, or the number of processes is not a
            multiple of `context_size`.
    """
    if not dist.is_initialized():
        raise ValueError(
            "torch.distributed: not initialised; allowed: after init_process_group, "
            "in processes that torchrun started"
        )
    world, rank = dist.get_world_size(), dist.get_rank()
    if not isinstance(context_size, int) or context_size < 1 or world % context_size:
        divisors = [n for n in range(1, world + 1) if world % n == 0]
        raise ValueError(
            f"context_size: {context_size!r} with {world} processes (this is rank {rank}); "
            f"allowed: a divisor of their number, {', '.join(map(str, divisors))}"
        )
    data_size = world // context_size
    contexts = [range(d * context_size, (d + 1) * context_size) for d in range(data_size)]
    datas = [range(c, world, context_size) for c in range(context_size)]
    # Every process takes part in making every group, its own or not.
    context_groups = [_make_group(ranks, timeout, urgent=True) for ranks in contexts]
    data_groups = [_make_group(ranks, timeout) for ranks in datas]
    world_group = _make_group(range(world), timeout)
    data_rank, context_rank = divmod(rank, context_size)
    return Mesh(
        context_rank,
        context_size,
        data_rank,
        data_size,
        context_groups[data_rank],
        data_groups[context_rank],
        world_group,
    )


def _make_group(ranks: range, timeout: timedelta | None, urgent: bool = False) -> dist.ProcessGroup:
    """`urgent`: with NCCL its kernels go before those that they are to overlap with."""
    options: Any = None
    if urgent and "nccl" in dist.get_backend():  # also beside gloo for the CPU
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        if timeout is not None:
            options._timeout = timeout
    group: Any = dist.new_group(list(ranks), timeout=timeout, pg_options=options)
    return group
