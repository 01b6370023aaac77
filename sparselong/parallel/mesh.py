"""The mesh of processes: data parallel times context parallel.

Process p works on sequence p // context_size of a step (its data rank), and on that sequence's
shard p % context_size (its context rank). A context group consists of consecutive ranks. On several
machines each sequence therefore stays on one machine, and only the gradients, once per step, are
exchanged between machines.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class Mesh:
    """This process's place in the mesh.

    Attributes:
        context_rank: index of its shard of the sequence.
        context_size: number of shards of a sequence.
        data_rank: index of its sequence in a step.
        data_size: number of sequences processed in parallel.
        context_group: the processes that share its sequence.
        data_group: the processes that hold the same shard of other sequences.
        world_group: all processes.
    """

    context_rank: int
    context_size: int
    data_rank: int
    data_size: int
    context_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    world_group: dist.ProcessGroup


def build_mesh(context_size: int, timeout: timedelta | None = None) -> Mesh:
    """Build the mesh of all processes; each must call this with the same arguments.

    Args:
        context_size: number of processes that share one sequence.
        timeout: how long an exchange may take; None: the backend's default.

    Raises:
        ValueError: torch.distributed is not initialized, or the number of processes is not a
            multiple of `context_size`.
    """
    if not dist.is_initialized():
        raise ValueError(
            "torch.distributed: not initialized; allowed: after init_process_group, "
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
    # Every process must take part in creating every group, even those that it is not in.
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
    """Create a group; with `urgent`, NCCL's kernels take priority over those they overlap with."""
    options: Any = None
    if urgent and "nccl" in dist.get_backend():  # the name may list gloo too
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        if timeout is not None:
            options._timeout = timeout
    group: Any = dist.new_group(list(ranks), timeout=timeout, pg_options=options)
    return group
