"""Data order: whole epochs, identical after an interruption, split among data ranks."""

import random
from typing import Any

import pytest
import torch
from accelerate import skip_first_batches
from torch.utils.data import DataLoader

from sparselong.finetune.batches import (
    EMPTY,
    IGNORED,
    Batches,
    EpochOrder,
    make_batches,
    only,
    take_tokens,
)

LENGTHS = random.Random(0).choices(range(3, 61), k=200)


def test_every_row_is_in_one_pack_and_no_pack_overflows():
    batches = make_batches(LENGTHS, 256, 2, seed=1)
    packs = [pack for batch in batches for pack in batch]
    assert sorted(row for pack in packs for row in pack) == list(range(200))
    assert max(sum(LENGTHS[row] for row in pack) for pack in packs) <= 256
    assert len(packs) <= 1.03 * sum(LENGTHS) / 256 + 1  # many small rows: little is wasted
    assert all(len(batch) == 2 for batch in batches[:-1])


def test_the_seed_determines_the_packs():
    assert make_batches(LENGTHS, 64, 2, seed=1) == make_batches(LENGTHS, 64, 2, seed=1)
    assert make_batches(LENGTHS, 64, 2, seed=1) != make_batches(LENGTHS, 64, 2, seed=2)


def test_without_packing_a_row_is_a_pack():
    batches = make_batches([5, 6, 7], None, 2, seed=0)
    assert [len(batch) for batch in batches] == [2, 1]
    assert sorted(batches[0] + batches[1]) == [[0], [1], [2]]


def test_a_row_longer_than_a_pack_is_refused():
    with pytest.raises(ValueError, match="65"):
        make_batches([5, 65], 64, 1, seed=0)


def numbers(order: EpochOrder, epoch: int, skipped: int = 0) -> list[int]:
    """Return the rows of one epoch as transformers' trainer reads them from a loader."""
    rows: Any = list(range(order.batches))
    loader = DataLoader(rows, batch_sampler=order, collate_fn=only)
    order.set_epoch(epoch)
    return list(skip_first_batches(loader, skipped) if skipped else loader)


def test_a_resumed_epoch_continues_regardless_of_earlier_random_draws():
    straight = EpochOrder(10, seed=3)
    epochs = [numbers(straight, epoch) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    torch.manual_seed(99)
    assert numbers(EpochOrder(10, seed=3), 2, skipped=4) == epochs[2][4:]
    assert numbers(EpochOrder(10, seed=None), 2) == list(range(10))


def test_data_ranks_split_an_epoch_and_take_equally_many_steps():
    whole = numbers(EpochOrder(10, seed=3), 1)
    orders = [EpochOrder(10, 3, rank, 4) for rank in range(4)]
    for order in orders:
        order.set_epoch(1)
    shares = [[number for (number,) in order] for order in orders]
    assert [len(share) for share in shares] == [3] * 4 == [len(order) for order in orders]
    in_turn = [share[step] for step in range(3) for share in shares]
    assert in_turn == [*whole, EMPTY, EMPTY]


def test_an_empty_batch_has_a_shape_and_no_supervised_token():
    rows = [{"input_ids": [5, 6], "labels": [IGNORED, 6]}]

    def collate(packs):
        return {key: torch.tensor([packs[0][0][key]]) for key in ("input_ids", "labels")}

    batches = Batches(rows, [[[0]]], collate, packed=True, pad_token=0)
    assert batches[0]["labels"].tolist() == [[IGNORED, 6]]
    assert (take_tokens(batches[0]), take_tokens(batches[EMPTY])) == (2, 0)
    assert batches[EMPTY]["input_ids"].tolist() == [[0, 0]]
    assert batches[EMPTY]["labels"].tolist() == [[IGNORED, IGNORED]]
