"""What the processes of a pool run: the parts, each for itself."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist

from sparselong.parallel.collectives import count_bytes
from sparselong.parallel.loss import add_losses, count_supervised, mean_loss, reduce_gradients
from sparselong.parallel.mesh import build_mesh
from sparselong.parallel.shard import shard_batch

mesh_of = functools.cache(build_mesh)  # groups are made once a process


def place(context_size: int) -> tuple[int, ...]:
    mesh = build_mesh(context_size)
    members = [dist.get_process_group_ranks(g) for g in (mesh.context_group, mesh.data_group)]
    where = (mesh.context_rank, mesh.context_size, mesh.data_rank, mesh.data_size)
    return (*where, *map(tuple, members))  # type: ignore[return-value]


def refused(context_size: Any) -> str:
    try:
        build_mesh(context_size)
    except ValueError as error:
        return str(error)
    return ""


def shard(batch: dict[str, torch.Tensor], context_size: int) -> dict[str, torch.Tensor]:
    return shard_batch(batch, mesh_of(context_size))


def shard_own(batches: list[dict[str, torch.Tensor]], context_size: int) -> str:
    """The message where every rank comes with a batch of its own."""
    try:
        shard_batch(batches[dist.get_rank()], mesh_of(context_size))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def count(labels: list[list[torch.Tensor]], context_size: int) -> int:
    return int(count_supervised(labels[dist.get_rank()], mesh_of(context_size)))


def losses(context_size: int) -> tuple[float, float]:
    """(sum of rank + 1, mean of 10 nats over each rank's one token of two)."""
    mesh, rank = mesh_of(context_size), dist.get_rank()
    labels = torch.tensor([[3, -100]])
    total = add_losses(torch.tensor(float(rank + 1), requires_grad=True), mesh)
    return float(total), float(
        mean_loss([torch.tensor(4.0), torch.tensor(6.0)], [labels] * 2, mesh)
    )


def reduced(dtype: torch.dtype, context_size: int) -> tuple[list[torch.Tensor], int]:
    """Gradients after their reduction, and the bytes that this took."""
    mesh, rank = mesh_of(context_size), dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    parameters = [torch.nn.Parameter(torch.zeros(n, 3, dtype=dtype)) for n in (1, 5, 2)]
    for n, parameter in enumerate(parameters):
        if n != 1 or rank != 1:  # rank 1 has no gradient for the second
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
    frozen = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
    with count_bytes() as sent:
        reduce_gradients([*parameters, frozen], mesh)
    assert frozen.grad is None
    return [p.grad for p in parameters], sent["gradients"]  # type: ignore[misc]
