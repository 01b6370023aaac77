"""Which conversations are in which batch: a function of seed, epoch and data rank, of nothing else.

Axolotl's sampler draws each epoch from the process's random state and makes packs anew. A run that
was killed inside an epoch and goes on has another random state, and accelerate's wrapper around a
partly read loader never passes the epoch on: it then trains on the first epoch's order again. And
as every drawing gives another number of packs, the longer epochs are cut to the shortest of four.

Here packs are made once, from a shuffle that the seed decides; an epoch is an order of the batches,
decided by seed and epoch. So every conversation is seen exactly once an epoch, all epochs are
equally long, and a place in an epoch is found again from its number. Conversations that share a
pack share it in every epoch; they do not see each other, so that only their common step is fixed.

With several data ranks each takes every `data_size`-th batch of the same order. Where the last
round is not full, the ranks left over get an *empty* batch: padding only, without a label.

Packing is best fit: each conversation goes into the fullest pack that has room for it. That fills
packs better than the first that has room, and takes a search in a sorted list instead of all packs.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import BatchSampler, Dataset

IGNORED = -100
EMPTY = -1
"""The number of the batch without a token."""

Pack = list[int]


def make_batches(
    lengths: Sequence[int], capacity_tokens: int | None, packs_per_batch: int, seed: int
) -> list[list[Pack]]:
    """Training batches: each a list of packs, each pack a list of rows.

    Args:
        lengths: tokens of each row.
        capacity_tokens: of a pack; None for a row in a pack of its own.
        packs_per_batch: the last batch may have fewer.
        seed: decides the shuffle.

    Raises:
        ValueError: a row is longer than a pack.
    """
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    if capacity_tokens is None:
        packs = [[row] for row in order]
    else:
        packs = _pack(order, lengths, capacity_tokens)
    starts = range(0, len(packs), packs_per_batch)
    return [packs[start : start + packs_per_batch] for start in starts]


def _pack(order: Sequence[int], lengths: Sequence[int], capacity: int) -> list[Pack]:
    if max(lengths) > capacity:
        raise ValueError(f"lengths: a row of {max(lengths)} tokens; allowed: up to {capacity}")
    shortest = min(lengths)
    packs: list[Pack] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, number of the pack), sorted
    for row in order:
        place = bisect.bisect_left(rooms, (lengths[row], -1))
        room, number = rooms.pop(place) if place < len(rooms) else (capacity, len(packs))
        if number == len(packs):
            packs.append([])
        packs[number].append(row)
        if room - lengths[row] >= shortest:
            bisect.insort(rooms, (room - lengths[row], number))
    return packs


class EpochOrder(BatchSampler):
    """The numbers of one data rank's batches in an epoch, each as a list of one.

    A torch BatchSampler, so that transformers' trainer can leave out the first ones when it goes on
    inside an epoch.

    Args:
        batches: how many there are.
        seed: decides the orders; None for the order as it is, in every epoch.
        data_rank, data_size: this rank's share.
    """

    def __init__(self, batches: int, seed: int | None, data_rank: int = 0, data_size: int = 1):
        self.batches, self.seed = batches, seed
        self.data_rank, self.data_size = data_rank, data_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration goes through."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(self.batches))
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed + 1 + self.epoch)
            order = torch.randperm(self.batches, generator=generator).tolist()
        order += [EMPTY] * (len(self) * self.data_size - self.batches)
        return iter([[number] for number in order[self.data_rank :: self.data_size]])

    def __len__(self) -> int:
        return -(-self.batches // self.data_size)


class Batches(Dataset):
    """Batches by number, collated when they are asked for.

    Args:
        rows: a datasets.Dataset with the model's columns.
        batches: as from `make_batches`.
        collate: rows, or lists of rows for packs, → tensors by name.
        packed: whether `collate` takes packs.
        pad_token: fills the empty batch.
    """

    def __init__(
        self,
        rows: Any,
        batches: list[list[Pack]],
        collate: Callable[[list], Any],
        packed: bool,
        pad_token: int,
    ):
        self.rows, self.batches, self.collate = rows, batches, collate
        self.packed, self.pad_token = packed, pad_token

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Any:
        packs = self.batches[max(number, 0)]
        taken = [[self.rows[row] for row in pack] for pack in packs]
        batch = self.collate(taken if self.packed else [pack[0] for pack in taken])
        if number == EMPTY:
            batch["input_ids"].fill_(self.pad_token)
            batch["labels"].fill_(IGNORED)
        return batch


def only(rows: list) -> Any:
    """The one element; collates what `EpochOrder` has asked for."""
    (row,) = rows
    return row
