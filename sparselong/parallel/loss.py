"""One loss over all shards and all sequences of a step: what is counted, divided and added.

Every shard's loss is the sum over its own supervised tokens divided by the number of supervised
tokens of the whole step: all shards, all data ranks, all micro-batches that are accumulated. A
shard without one contributes exactly zero, and nothing divides by a count of its own. So

    counts = count_step([every micro-batch], mesh, pad_token)
    for each micro-batch: model(**shard, num_items_in_batch=counts.divisor).loss.backward()
    reduce_gradients(parameters, mesh)

gives the gradient that one GPU would have, `add_losses` its loss, and `mean_loss` that of an
evaluation.
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
    """[rows, tokens + padding]: the label of the token after each, -100 after the last."""
    return functional.pad(labels, (0, padding + 1), value=IGNORED)[..., 1:]


def supervised_labels(batch: Batch) -> torch.Tensor:
    """Return the labels that a batch, or a shard of one, is trained or measured on.

    Args:
        batch: `shift_labels` where labels stand with the token before theirs, else `labels`, whose
            first no token predicts.
    """
    return batch["shift_labels"] if "shift_labels" in batch else batch["labels"][:, 1:]


def count_supervised(labels: torch.Tensor) -> torch.Tensor:
    """Number of labels that count, int64 scalar on their device."""
    return (labels != IGNORED).sum()


@dataclass(frozen=True)
class StepCounts:
    """What all ranks train on in a step.

    Attributes:
        tokens: real ones, without padding.
        divisor: supervised tokens, by which every rank's loss is divided; at least 1, so that the
            loss of a step without any is 0, not NaN.
    """

    tokens: int
    divisor: int


def count_step(batches: Iterable[Batch], mesh: Mesh | None, pad_token: int) -> StepCounts:
    """Count a step's tokens over all data ranks.

    Args:
        batches: this data rank's, whole, one or more micro-batches.
        mesh: this process's place; None where it trains alone.
        pad_token: of `input_ids`, where a batch has no attention mask.
    """
    counts = torch.tensor(
        [
            [_count_tokens(batch, pad_token), int(count_supervised(supervised_labels(batch)))]
            for batch in batches
        ]
    ).sum(0)
    if mesh is not None:
        counts = sum_over_ranks(counts, mesh.data_group, "token count")
    tokens, supervised = counts.tolist()
    return StepCounts(tokens, max(supervised, 1))


def _count_tokens(batch: Batch, pad_token: int) -> int:
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    return int((batch["input_ids"] != pad_token).sum())


def add_losses(local: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """The loss of the step from every rank's part of it, in fp32: what is logged.

    Args:
        local: scalar; sums over this rank's tokens, divided by the global count or not yet.
    """
    wide = local.detach().to(torch.promote_types(local.dtype, torch.float32))
    return sum_over_ranks(wide.reshape(1), mesh.world_group, "loss")[0]


def mean_loss(parts: Iterable[tuple[torch.Tensor, Batch]], mesh: Mesh | None) -> float:
    """Return the loss per supervised token of an evaluation, over all ranks and batches.

    Sums are in float64; each part is read before the next is asked for.

    Args:
        parts: this rank's sums of token losses, as `num_items_in_batch=1` gives them, each with the
            batch or shard that it is of.
        mesh: this process's place; None where it evaluates alone.

    Returns:
        NaN where no token is supervised.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    for loss, batch in parts:
        sums += torch.tensor([float(loss), int(count_supervised(supervised_labels(batch)))])
    if mesh is not None:
        sums = sum_over_ranks(sums, mesh.world_group, "evaluation")
    total, supervised = sums.tolist()
    return total / supervised if supervised else math.nan
