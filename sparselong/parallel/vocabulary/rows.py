"""Rows of all ranks in one place, and results that return to the ranks whose rows they are.

Each rank holds some rows (tokens), and every rank must see all of them, because each holds other
columns of the vocabulary. They are gathered in chunks of at most `chunk_rows` of each rank's rows.
The next chunk's gather runs while this chunk is processed. A rank without rows takes part in every
exchange; ranks with fewer rows send padding that no rank processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional

from sparselong.kernels.layer import IGNORED
from sparselong.parallel.collectives import (
    Group,
    Pending,
    all_gather,
    start_all_gather,
    start_all_to_all,
)

COUNTS, LABELS, ROWS = "loss counts", "loss labels", "loss rows"


@dataclass(frozen=True)
class Labels:
    """The labels of every rank's rows.

    Attributes:
        counts: number of rows of each rank.
        values: int64 [P, most rows of a rank], padded with -100.
        needs_gradient: whether any rank needs its rows' gradient.
    """

    counts: tuple[int, ...]
    values: torch.Tensor
    needs_gradient: bool


@dataclass(frozen=True)
class Chunk:
    """Rows that are processed at once, those of rank 0 first.

    Attributes:
        rows: [rows, width].
        targets: int64 [rows].
        counts: number of them that are each rank's.
        own: this rank's among them.
        place: their place among all of this rank's rows.
    """

    rows: torch.Tensor
    targets: torch.Tensor
    counts: tuple[int, ...]
    own: slice
    place: slice


def gather_labels(labels: torch.Tensor, needs_gradient: bool, vocab: int, group: Group) -> Labels:
    """Gather the labels of all ranks' rows; each rank may have another number of rows.

    Args:
        labels: int64 [rows], each in the vocabulary.
        needs_gradient: whether this rank needs its rows' gradient.
        vocab: number of tokens in the vocabulary.
        group: the ranks that share the vocabulary.

    Raises:
        ValueError: on every rank, a label of any rank is out of range.
        ExchangeError: a rank is gone, or did not take part in time.
    """
    low, high = (int(t) for t in labels.aminmax()) if len(labels) else (0, 0)
    mine = torch.tensor([len(labels), needs_gradient, low, high], device=labels.device)
    found = [each.tolist() for each in all_gather(mine, group, COUNTS)]
    for rank, (_, _, lowest, highest) in enumerate(found):
        if not 0 <= lowest <= highest < vocab:
            raise ValueError(
                f"labels: between {lowest} and {highest} on rank {rank} of the vocabulary's group; "
                f"allowed: {IGNORED} in training, or 0 to {vocab - 1}"
            )
    counts = tuple(each[0] for each in found)
    values = pad_rows(labels, max(counts), IGNORED)[None]
    if max(counts):
        values = start_all_gather(values[0], group, LABELS).wait()
    return Labels(counts, values, any(each[1] for each in found))


def gather_chunks(
    hidden: torch.Tensor, labels: Labels, rank: int, chunk_rows: int, group: Group
) -> Iterator[Chunk]:
    """Yield all ranks' rows in chunks, while the next chunk's rows are on their way.

    Args:
        hidden: [rows, width], this rank's rows.
        labels: the labels of all ranks' rows.
        rank: this process's rank in the group.
        chunk_rows: the most rows of each rank in a chunk.
        group: the ranks that share the vocabulary.

    Raises:
        ExchangeError: a rank is gone, or did not take part in time.
    """
    most = max(labels.counts)

    def start(first: int) -> Pending:
        last = min(first + chunk_rows, most)
        return start_all_gather(pad_rows(hidden[first:last], last - first), group, ROWS)

    pending = start(0) if most else None
    for first in range(0, most, chunk_rows):
        assert pending is not None
        gathered, last = pending.wait(), min(first + chunk_rows, most)
        pending = start(last) if last < most else None
        counts = tuple(min(max(count - first, 0), last - first) for count in labels.counts)
        before = sum(counts[:rank])
        yield Chunk(
            join_rows(gathered, counts),
            join_rows(labels.values[:, first:last], counts),
            counts,
            slice(before, before + counts[rank]),
            slice(first, first + counts[rank]),
        )


def pad_rows(rows: torch.Tensor, count: int, value: int = 0) -> torch.Tensor:
    """Return the rows, contiguous, with as many of this value after them as make `count`."""
    if len(rows) == count:
        return rows.contiguous()
    after = (0, 0) * (rows.dim() - 1) + (0, count - len(rows))
    return functional.pad(rows, after, value=value)


def join_rows(parts: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
    """Return the first `counts[r]` rows of every rank's part of [P, rows, ...], in rank order."""
    if all(count == parts.shape[1] for count in counts):
        return parts.flatten(0, 1)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def start_return(
    partial: torch.Tensor, counts: tuple[int, ...], rank: int, group: Group, tag: str
) -> Pending:
    """Send each rank this rank's part of its rows' results.

    Args:
        partial: [sum of counts, width], the rows of rank 0 first.
        counts: number of rows of each rank.
        rank: this process's rank in the group.
        group: the ranks that share the vocabulary.
        tag: the tag under which bytes are counted.

    Returns:
        The running exchange of [P * counts[rank], width], in rank order.
    """
    return start_all_to_all(partial, list(counts), [counts[rank]] * len(counts), group, tag)
