"""The mesh of processes: data parallel times context parallel, and the groups that share experts.

Process p works on sequence p // context_size of a step (its data rank), and on that sequence's
shard p % context_size (its context rank). A context group consists of consecutive ranks. On several
machines each sequence therefore stays on one machine, and only the gradients, once per step, are
exchanged between machines.

An expert group is any `expert_size` consecutive ranks of one machine, whatever they compute: shards
of one sequence, or different sequences. Its ranks share one copy of experts and vocabulary.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sparselong.parallel.collectives import all_gather

MOST_BLOCKS = 8
"""Most thread blocks of NCCL's kernels.

Each has buffers for every peer: two H100 with NCCL's choice took 1.41 GiB, with 8 blocks 0.81, two
H200 0.80, without peer access 0.59 (libraries included), and exchanged as fast. Fewer blocks also
leave more of the GPU to the kernels that run beside them.
"""


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
        expert_rank: index of the experts and vocabulary rows that it holds.
        expert_size: number of processes that share experts and vocabulary; 1: each holds all.
        expert_group: these processes.
        expert_near: whether they all reach each other's GPU memory without the host's.
        replica_group: the processes that hold the same experts.
    """

    context_rank: int
    context_size: int
    data_rank: int
    data_size: int
    context_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    world_group: dist.ProcessGroup
    expert_rank: int
    expert_size: int
    expert_group: dist.ProcessGroup
    expert_near: bool
    replica_group: dist.ProcessGroup


def build_mesh(
    context_size: int, timeout: timedelta | None = None, *, expert_size: int = 1
) -> Mesh:
    """Build the mesh of all processes; each must call this with the same arguments.

    Args:
        context_size: number of processes that share one sequence.
        timeout: how long an exchange may take; None: the backend's default.
        expert_size: number of processes, all on one machine, that share experts and vocabulary.

    Raises:
        ValueError: torch.distributed is not initialized, or the number of processes is not a
            multiple of `context_size` and of `expert_size`.
    """
    if not dist.is_initialized():
        raise ValueError(
            "torch.distributed: not initialized; allowed: after init_process_group, "
            "in processes that torchrun started"
        )
    world, rank = dist.get_world_size(), dist.get_rank()
    for name, size in (("context_size", context_size), ("expert_size", expert_size)):
        if not isinstance(size, int) or size < 1 or world % size:
            divisors = [n for n in range(1, world + 1) if world % n == 0]
            raise ValueError(
                f"{name}: {size!r} with {world} processes (this is rank {rank}); "
                f"allowed: a divisor of their number, {', '.join(map(str, divisors))}"
            )
    groups = _Groups(timeout)
    data_size = world // context_size
    data_rank, context_rank = divmod(rank, context_size)
    contexts = groups.make(_neighbours(world, context_size), urgent=True)
    experts = groups.make(_neighbours(world, expert_size), urgent=True)
    everyone = groups.make([range(world)])
    datas = groups.make(_every(world, context_size))
    replicas = groups.make(_every(world, expert_size))
    return Mesh(
        context_rank,
        context_size,
        data_rank,
        data_size,
        contexts[data_rank],
        datas[context_rank],
        everyone[0],
        rank % expert_size,
        expert_size,
        experts[rank // expert_size],
        expert_size > 1 and _is_near(experts[rank // expert_size]),
        replicas[rank % expert_size],
    )


def _is_near(group: dist.ProcessGroup) -> bool:
    """Return whether NCCL may use peer access between all GPUs; every process must call this."""
    near = "nccl" in dist.get_backend(group) and os.environ.get("NCCL_P2P_DISABLE", "0") == "0"
    if near:
        own = torch.cuda.current_device()
        others = [other for other in range(torch.cuda.device_count()) if other != own]
        near = all(torch.cuda.can_device_access_peer(own, other) for other in others)
    return all(bool(each) for each in all_gather(torch.tensor([int(near)]), group, "peer access"))


def _neighbours(world: int, size: int) -> list[range]:
    """Split the ranks into groups of consecutive ones."""
    return [range(first, first + size) for first in range(0, world, size)]


def _every(world: int, size: int) -> list[range]:
    """Split the ranks into `size` groups, each of every size-th rank."""
    return [range(first, world, size) for first in range(size)]


class _Groups:
    """Process groups, one for each set of ranks: a communicator takes GPU memory.

    Every process must take part in creating every group, even those that it is not in.
    """

    def __init__(self, timeout: timedelta | None):
        self.timeout = timeout
        self.made: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def make(self, parts: list[range], urgent: bool = False) -> list[dist.ProcessGroup]:
        """Return the groups of these ranks; a set that has one already keeps its priority."""
        for ranks in parts:
            if tuple(ranks) not in self.made:
                self.made[tuple(ranks)] = _make_group(ranks, self.timeout, urgent)
        return [self.made[tuple(ranks)] for ranks in parts]


def _make_group(ranks: range, timeout: timedelta | None, urgent: bool) -> dist.ProcessGroup:
    """Create a group.

    Args:
        ranks: its processes.
        timeout: how long an exchange may take.
        urgent: whether NCCL's kernels take priority over those they overlap with.
    """
    options: Any = None
    if "nccl" in dist.get_backend():  # the name may list gloo too
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=urgent)
        options.config.max_ctas = MOST_BLOCKS
        if timeout is not None:
            options._timeout = timeout
    group: Any = dist.new_group(list(ranks), timeout=timeout, pg_options=options)
    return group
