"""Compute one loss over all shards and all sequences of a step.

Every shard's loss is the sum over its own supervised tokens, divided by the number of supervised
tokens in the whole step: all shards, data ranks and accumulated micro-batches. A shard without
supervised tokens contributes exactly zero, because no shard divides by its own count. So

    counts = count_step([every micro-batch], mesh, tokens)
    for each micro-batch: model(**shard, num_items_in_batch=counts.divisor).loss.backward()
    reduce_gradients(parameters, mesh)

gives the gradient of a single GPU. `add_losses` gives its training loss, `mean_loss` its
evaluation loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from sparselong.kernels.layer import IGNORED
from sparselong.parallel.collectives import sum_over_ranks
from sparselong.parallel.mesh import Mesh

Batch = Mapping[str, torch.Tensor]


def shift_labels(labels: torch.Tensor, padding: int = 0) -> torch.Tensor:
    """Return [rows, tokens + padding]: each token's next label, -100 for the last and padding."""
    return functional.pad(labels, (0, padding + 1), value=IGNORED)[..., 1:]


def supervised_labels(batch: Batch) -> torch.Tensor:
    """Return the labels that the loss of a batch, or of a shard, is computed on.

    Args:
        batch: with `shift_labels`, whose labels are already shifted, or else with `labels`, whose
            first label no token predicts.
    """
    return batch["shift_labels"] if "shift_labels" in batch else batch["labels"][:, 1:]


def count_supervised(labels: torch.Tensor) -> torch.Tensor:
    """Return the number of labels that are not IGNORED, an int64 scalar on their device."""
    return (labels != IGNORED).sum()


@dataclass(frozen=True)
class StepCounts:
    """Token counts of a step, over all ranks.

    Attributes:
        tokens: tokens without padding.
        divisor: supervised tokens, by which every rank's loss is divided; at least 1, so that a
            step without any has a loss of 0, not NaN.
    """

    tokens: int
    divisor: int


def count_step(batches: Iterable[Batch], mesh: Mesh | None, tokens: int) -> StepCounts:
    """Count a step's tokens over all data ranks.

    Args:
        batches: this data rank's micro-batches, not sharded.
        mesh: this process's place in the mesh; None if it trains alone.
        tokens: number of tokens in `batches` without padding. Whoever padded them knows it;
            `input_ids` do not show it, because text may contain the padding token.
    """
    supervised = sum(int(count_supervised(supervised_labels(batch))) for batch in batches)
    counts = torch.tensor([tokens, supervised])
    if mesh is not None:
        counts = sum_over_ranks(counts, mesh.data_group, "token count")
    tokens, supervised = counts.tolist()
    return StepCounts(tokens, max(supervised, 1))


def add_losses(local: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Sum every rank's part of the step's loss, in at least fp32, for logging.

    Args:
        local: scalar; the sum over this rank's tokens, with or without the global divisor.
        mesh: this process's place in the mesh.
    """
    wide = local.detach().to(torch.promote_types(local.dtype, torch.float32))
    return sum_over_ranks(wide.reshape(1), mesh.world_group, "loss")[0]


def mean_loss(parts: Iterable[tuple[torch.Tensor, Batch]], mesh: Mesh | None) -> float:
    """Return an evaluation's loss per supervised token, over all ranks and batches.

    Sums are in float64. Each part is read before the next one is requested.

    Args:
        parts: this rank's summed token losses, as computed with `num_items_in_batch=1`, each with
            its batch or shard.
        mesh: this process's place in the mesh; None if it evaluates alone.

    Returns:
        The mean loss in nats; NaN if no token is supervised.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    for loss, batch in parts:
        sums += torch.tensor([float(loss), int(count_supervised(supervised_labels(batch)))])
    if mesh is not None:
        sums = sum_over_ranks(sums, mesh.world_group, "evaluation")
    total, supervised = sums.tolist()
    return total / supervised if supervised else math.nan
