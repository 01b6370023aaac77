"""Sum gradients over all shards and all sequences of a step.

Gradients of replicated parameters are summed, not averaged, because each rank's loss is already
divided by the step's divisor (`loss.py`). This includes the sinks' gradient, to which each rank
contributes its own queries' part.

Gradients of sharded experts' adapters are already sums over the rows of the expert group, which
exchanged them (`experts/`). They are summed over the groups' ranks that hold the same experts only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from sparselong.parallel.collectives import sum_in_slices, sum_over_ranks
from sparselong.parallel.mesh import Mesh

PART_ELEMENTS = 1 << 24
"""Gradient elements summed at once; peak memory is five times their fp32 size."""


@torch.no_grad()
def reduce_gradients(
    parameters: Iterable[torch.nn.Parameter],
    mesh: Mesh,
    sharded: Iterable[torch.nn.Parameter] = (),
) -> None:
    """Sum gradients over all ranks that hold the same parameters, in fp32 and in rank order.

    The sums are the same bits on every rank and in every run. A parameter without a gradient on
    this rank contributes zero.

    Args:
        parameters: the trained parameters, in the same order on every rank.
        mesh: this process's place in the mesh.
        sharded: those of them that the ranks of an expert group share, each holding a part.
    """
    apart = {id(parameter) for parameter in sharded}
    trained = [p for p in parameters if p.requires_grad]
    for group, chosen in (
        (mesh.world_group, [p for p in trained if id(p) not in apart]),
        (mesh.replica_group, [p for p in trained if id(p) in apart]),
    ):
        if dist.get_world_size(group) > 1:
            for some in _in_parts(chosen):
                _reduce_at_once(some, group)


@torch.no_grad()
def gradient_norm(
    parameters: Iterable[torch.nn.Parameter],
    mesh: Mesh | None,
    sharded: Iterable[torch.nn.Parameter] = (),
) -> torch.Tensor:
    """Return the 2-norm of the whole model's gradient, fp32, the same bits on every rank.

    Args:
        parameters: the trained parameters, with reduced gradients.
        mesh: this process's place in the mesh; None if it trains alone.
        sharded: those of them that the ranks of an expert group share; every part counts once.
    """
    apart = {id(parameter) for parameter in sharded}
    with_gradient = [p for p in parameters if p.grad is not None]
    squares = [_sum_squares([p for p in with_gradient if id(p) not in apart])]
    parts = _sum_squares([p for p in with_gradient if id(p) in apart])
    if mesh is not None and mesh.expert_size > 1:
        parts = sum_over_ranks(parts[None], mesh.expert_group, "gradient norm")[0]
    return (squares[0] + parts.to(squares[0].device)).sqrt()


def _sum_squares(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """Return the sum of all gradients' squares, fp32."""
    if not parameters:
        return torch.zeros(())
    grads: Any = [p.grad for p in parameters]
    norms = torch._foreach_norm(grads, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack(list(norms)).square().sum()


def _in_parts(parameters: list[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Yield consecutive parameters of at most PART_ELEMENTS in total, or a single larger one."""
    part: list[torch.nn.Parameter] = []
    elements = 0
    for parameter in parameters:
        if part and elements + parameter.numel() > PART_ELEMENTS:
            yield part
            part, elements = [], 0
        part.append(parameter)
        elements += parameter.numel()
    if part:
        yield part


def _reduce_at_once(parameters: list[torch.nn.Parameter], group: dist.ProcessGroup) -> None:
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    grads: list[Any] = [parameter.grad for parameter in parameters]
    joined = torch.cat([grad.flatten().float() for grad in grads])
    total = sum_in_slices(joined, group, "gradients")
    parts = total.split([grad.numel() for grad in grads])
    sums = [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)]
    torch._foreach_copy_(grads, sums)  # pyright: ignore[reportPrivateImportUsage]
