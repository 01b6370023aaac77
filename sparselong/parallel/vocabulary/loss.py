"""Cross-entropy with the lm_head's rows sharded over ranks; no rank holds a row's whole logits.

As in `kernels/layer/cross_entropy.py`, logits exist for a chunk of rows at a time and their
gradient is computed in the forward pass. A chunk has up to `chunk_rows` rows of each of the P
ranks, and a rank computes 1/P of their columns, so it holds as many logits as without sharding:

    gather the rows of all ranks                          (chunk i + 1 while chunk i is computed)
    logits = rows @ own table^T
    exchange each row's maximum, sum and target's logit   (3 fp32 a row: kernels/layer)
    logits -> gradients, in place
    partial = gradients @ own table
    each rank's rows go home and are added in fp32        (while chunk i + 1's logits are computed)

Sums over ranks are in rank order, so the result is the same bits in every run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from sparselong.kernels.experts import sum_parts
from sparselong.kernels.layer import (
    combine_statistics,
    shard_statistics,
    turn_into_shard_gradients,
)
from sparselong.parallel.collectives import Group, Pending, start_all_gather
from sparselong.parallel.vocabulary.rows import (
    Chunk,
    Labels,
    gather_chunks,
    start_return,
)

STATISTICS, BEST, GRADIENTS = "loss statistics", "best tokens", "loss gradients"


@dataclass(frozen=True)
class Head:
    """This rank's columns of the lm_head.

    Attributes:
        first: the vocabulary's index of the table's first row.
        rank: this process's rank in the group.
        group: the ranks that share the vocabulary.
        chunk_rows: the most rows of each rank whose logits exist at once.
    """

    first: int
    rank: int
    group: Group
    chunk_rows: int


def sum_row_losses(
    hidden: torch.Tensor, table: torch.Tensor, labels: Labels, head: Head
) -> torch.Tensor:
    """Return the sum of the losses of this rank's rows, with a gradient for them.

    Args:
        hidden: [rows, width], all with a label.
        table: [held, width], this rank's rows of the lm_head.
        labels: the labels of every rank's rows.
        head: how to exchange.

    Raises:
        ExchangeError: a rank is gone, or did not take part in time.
    """
    return _ShardedCrossEntropy.apply(hidden, table, labels, head)  # pyright: ignore[reportReturnType]


class _ShardedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, hidden: torch.Tensor, table: torch.Tensor, labels: Labels, head: Head
    ) -> torch.Tensor:
        losses, dhidden = _row_losses(hidden, table, labels, head)
        ctx.save_for_backward(dhidden)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dhidden,) = ctx.saved_tensors
        # Not in bf16, which would round dloss itself by up to 0.2 %.
        scaled = dhidden.to(dloss.dtype, copy=True).mul_(dloss)
        return scaled.to(dhidden.dtype), None, None, None


def _row_losses(
    hidden: torch.Tensor, table: torch.Tensor, labels: Labels, head: Head
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return each of this rank's rows' loss, and their sum's gradient if any rank needs its own."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    losses = torch.empty(len(hidden), dtype=wide, device=hidden.device)
    dhidden = torch.empty_like(hidden) if labels.needs_gradient else None
    returning: tuple[Pending, slice] | None = None
    with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
        buffer = make_buffer(hidden, table, labels.counts, head.chunk_rows)
        for chunk in gather_chunks(hidden, labels, head.rank, head.chunk_rows, head.group):
            logits = buffer[: len(chunk.rows)]
            torch.mm(chunk.rows, table.T, out=logits)
            if returning is not None:
                _finish(returning, dhidden)
            found = shard_statistics(logits, chunk.targets, head.first)
            parts = start_all_gather(found, head.group, STATISTICS).wait()
            row_losses, normalizers = combine_statistics(parts)
            losses[chunk.place] = row_losses[chunk.own]
            if dhidden is not None:
                turn_into_shard_gradients(logits, chunk.targets, head.first, normalizers)
                partial = torch.mm(logits, table)
                pending = start_return(partial, chunk.counts, head.rank, head.group, GRADIENTS)
                returning = pending, chunk.place
        if returning is not None:
            _finish(returning, dhidden)
    return losses, dhidden


def _finish(returning: tuple[Pending, slice], dhidden: torch.Tensor | None) -> None:
    """Add the parts of a chunk's gradients that are on their way home."""
    assert dhidden is not None
    pending, place = returning
    out = dhidden[place]
    parts = pending.wait()
    if len(out):
        sum_parts(parts.view(-1, *out.shape), out)


def make_buffer(
    hidden: torch.Tensor, table: torch.Tensor, counts: tuple[int, ...], chunk_rows: int
) -> torch.Tensor:
    """Return memory for this rank's logits of the largest chunk."""
    rows = sum(min(count, chunk_rows) for count in counts)
    return hidden.new_empty(rows, len(table))


@torch.no_grad()
def score_chunks(
    chunks: Iterable[Chunk], table: torch.Tensor, buffer: torch.Tensor, head: Head, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this rank's rows' log-probabilities of their labels, and their most likely tokens.

    Args:
        chunks: rows of all ranks.
        table: [held, width], this rank's rows of the lm_head.
        buffer: [rows of the largest chunk, held], for the logits.
        head: how to exchange.
        rows: number of this rank's rows.

    Returns:
        (fp32 [rows], fp64 from fp64; int64 [rows], the first of tokens with equal logits).
    """
    wide = torch.promote_types(table.dtype, torch.float32)
    scores = torch.empty(rows, dtype=wide, device=table.device)
    best = torch.empty(rows, dtype=torch.int64, device=table.device)
    with torch.autocast(table.device.type, enabled=False), torch.cuda.device_of(table):
        for chunk in chunks:
            logits = buffer[: len(chunk.rows)]
            torch.mm(chunk.rows, table.T, out=logits)
            found = shard_statistics(logits, chunk.targets, head.first)
            tokens = chunk.targets if not len(table) else logits.argmax(1) + head.first
            started = (
                start_all_gather(found, head.group, STATISTICS),
                start_all_gather(tokens, head.group, BEST),
            )
            parts, candidates = (each.wait() for each in started)
            # Of ranks with equal maxima the first, which holds the first of these tokens.
            winner = parts[..., 0].argmax(0)
            scores[chunk.place] = -combine_statistics(parts)[0][chunk.own]
            best[chunk.place] = candidates.gather(0, winner[None])[0][chunk.own]
    return scores, best
