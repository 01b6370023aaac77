"""Sum gradients over all shards and all sequences of a step.

Gradients of replicated parameters are summed, not averaged, because each rank's loss is already
divided by the step's divisor (`loss.py`). This includes the sinks' gradient, to which each rank
contributes its own queries' part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from sparselong.parallel.collectives import sum_in_slices
from sparselong.parallel.mesh import Mesh

PART_ELEMENTS = 1 << 24
"""Gradient elements summed at once; peak memory is five times their fp32 size."""


@torch.no_grad()
def reduce_gradients(parameters: Iterable[torch.nn.Parameter], mesh: Mesh) -> None:
    """Sum the gradients of replicated parameters over all ranks, in fp32 and in rank order.

    The sums are the same bits on every rank and in every run. A parameter without a gradient on
    this rank contributes zero.

    Args:
        parameters: the same parameters in the same order on every rank.
        mesh: this process's place in the mesh.
    """
    trained = [p for p in parameters if p.requires_grad]
    if mesh.context_size * mesh.data_size == 1:
        return
    for some in _in_parts(trained):
        _reduce_at_once(some, mesh)


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


def _reduce_at_once(parameters: list[torch.nn.Parameter], mesh: Mesh) -> None:
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    grads: list[Any] = [parameter.grad for parameter in parameters]
    joined = torch.cat([grad.flatten().float() for grad in grads])
    total = sum_in_slices(joined, mesh.world_group, "gradients")
    parts = total.split([grad.numel() for grad in grads])
    sums = [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)]
    torch._foreach_copy_(grads, sums)  # pyright: ignore[reportPrivateImportUsage]
