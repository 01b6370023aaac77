"""Assign conversations to batches as a function of seed, epoch and data rank alone.

Axolotl's sampler shuffles and packs each epoch again, from the process's random state. A resumed
run has another random state, and accelerate's wrapper around a partly read loader never passes the
epoch on, so the run would repeat the first epoch's order. Each shuffle also gives a different
number of packs, so Axolotl cuts epochs to the shortest of four.

Here conversations are packed once, after a shuffle that depends only on the seed. An epoch is an
order of the batches that depends on seed and epoch. So every conversation occurs exactly once per
epoch, all epochs are equally long, and a resumed run finds its position by number. Conversations
that share a pack share it in every epoch. They do not attend to each other, so this only fixes
which conversations share a step.

With several data ranks each takes every `data_size`-th batch of the same order. If the last round
is not full, the remaining ranks get an *empty* batch: only padding, no labels.

Packing is best fit: each conversation goes into the fullest pack with enough room. This fills packs
better than first fit, and needs only a binary search in a sorted list.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import BatchSampler, Dataset

IGNORED = -100
EMPTY = -1
"""The number of the empty batch."""
TOKENS = "tokens"
"""The entry of a batch that holds its number of tokens without padding."""

Pack = list[int]


def make_batches(
    lengths: Sequence[int], capacity_tokens: int | None, packs_per_batch: int, seed: int
) -> list[list[Pack]]:
    """Return training batches: each is a list of packs, each pack a list of row numbers.

    Args:
        lengths: number of tokens of each row.
        capacity_tokens: maximum tokens of a pack; None: one row per pack.
        packs_per_batch: packs of a batch; the last batch may have fewer.
        seed: seed of the shuffle.

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
    """The batch numbers of one data rank in an epoch, each in a one-element list.

    It is a torch BatchSampler, so that transformers' trainer can skip the first batches when it
    resumes inside an epoch.

    Args:
        batches: number of batches.
        seed: seed of the orders; None: ascending order in every epoch.
        data_rank: this data rank.
        data_size: number of data ranks.
    """

    def __init__(self, batches: int, seed: int | None, data_rank: int = 0, data_size: int = 1):
        self.batches, self.seed = batches, seed
        self.data_rank, self.data_size = data_rank, data_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
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
    """Batches by number, collated on access, each with its number of tokens under TOKENS.

    Args:
        rows: rows with `input_ids` and `labels`, by number.
        batches: as returned by `make_batches`.
        collate: turns rows, or lists of rows for packs, into tensors by name.
        packed: whether `collate` takes packs; rows then have `position_ids`, else an
            `attention_mask`.
        pad_token: token that fills the empty batch.
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
        taken = [[self._complete(self.rows[row]) for row in pack] for pack in packs]
        # Counted before padding: text may contain the padding token.
        tokens = sum(len(row["input_ids"]) for pack in taken for row in pack)
        batch = self.collate(taken if self.packed else [pack[0] for pack in taken])
        if number == EMPTY:
            batch["input_ids"].fill_(self.pad_token)
            batch["labels"].fill_(IGNORED)
            tokens = 0
        batch[TOKENS] = tokens
        return batch

    def _complete(self, row: dict[str, list[int]]) -> dict[str, list[int]]:
        count = len(row["input_ids"])
        if self.packed:
            return {**row, "position_ids": list(range(count))}
        return {**row, "attention_mask": [1] * count}


def take_tokens(batch: Any) -> int:
    """Remove the number of tokens from a batch, whose other entries the model takes."""
    return batch.pop(TOKENS)


def only(rows: list) -> Any:
    """Return the only element: the collate function for `EpochOrder`'s one-element lists."""
    (row,) = rows
    return row
