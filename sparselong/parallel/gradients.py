"""One loss and one gradient over all shards and all sequences of a step.

Every shard's loss is the sum over its own supervised tokens divided by the number of supervised
tokens of the whole step: all shards, all data ranks, all micro-batches that are accumulated. A
shard without one contributes exactly zero, and nothing divides by a count of its own. So

    count = count_supervised([every micro-batch's shift_labels], mesh)
    for each micro-batch: model(**shard, num_items_in_batch=count).loss.backward()
    reduce_gradients(parameters, mesh)

gives the gradient that one GPU would have, and `add_losses` its loss. Gradients of parameters that
every rank holds are added, not averaged; among them is the sinks', of which each rank has the part
of its own queries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from sparselong.kernels.layer import IGNORED
from sparselong.parallel.collectives import sum_in_slices, sum_over_ranks
from sparselong.parallel.mesh import Mesh

PART_ELEMENTS = 1 << 24
"""Gradients that are summed at once: what is alive meanwhile is five times their fp32 size."""


def count_supervised(shift_labels: Iterable[torch.Tensor], mesh: Mesh) -> torch.Tensor:
    """The supervised tokens of a step over all ranks: the divisor of every rank's loss.

    Args:
        shift_labels: this rank's, of each micro-batch of the accumulation window.

    Returns:
        int64 scalar, at least 1: a step without any has loss 0, not NaN.
    """
    counts = [(labels != IGNORED).sum() for labels in shift_labels]
    total = sum_over_ranks(torch.stack(counts).sum()[None], mesh.world_group, "token count")
    return total[0].clamp(min=1)


def add_losses(local: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """The loss of the step from every rank's part of it, in fp32: what is logged.

    Args:
        local: scalar; sums over this rank's tokens, divided by the global count or not yet.
    """
    wide = local.detach().to(torch.promote_types(local.dtype, torch.float32))
    return sum_over_ranks(wide.reshape(1), mesh.world_group, "loss")[0]


def mean_loss(
    loss_sums: Iterable[torch.Tensor], shift_labels: Iterable[torch.Tensor], mesh: Mesh
) -> torch.Tensor:
    """The loss per supervised token of an evaluation, over all ranks and batches.

    Args:
        loss_sums: this rank's sums of token losses, as `num_items_in_batch=1` gives them.
        shift_labels: this rank's, of the same batches.
    """
    total = add_losses(torch.stack(list(loss_sums)).sum(), mesh)
    return total / count_supervised(shift_labels, mesh).to(total.device)


@torch.no_grad()
def reduce_gradients(parameters: Iterable[torch.nn.Parameter], mesh: Mesh) -> None:
    """Adds the gradients of replicated parameters over all ranks, in fp32, in rank order.

    Every rank must pass the same parameters in the same order. One without a gradient on this rank
    counts as zero. Same bits on every rank and in every run.
    """
    trained = [p for p in parameters if p.requires_grad]
    if mesh.context_size * mesh.data_size == 1:
        return
    for some in _in_parts(trained):
        _reduce_at_once(some, mesh)


def _in_parts(parameters: list[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Neighbours of PART_ELEMENTS together, or a single larger one."""
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
