"""Rows of a batch that several processes evaluate together."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from sparselong.evaluate.spread import Spread

BATCH = [[1, 2, 3, 4], [5, 6, 7], [8, 9, 10]]


def spread_of(rank: int, size: int) -> Spread:
    return Spread(cast(Any, SimpleNamespace(data_size=size, data_rank=rank)))


@pytest.mark.parametrize(
    ("rank", "rows"), [(0, [[1, 2, 3, 4], [8, 9, 10, 0]]), (1, [[5, 6, 7, 0]])]
)
def test_every_process_pads_to_the_longest_row_of_all(rank, rows):
    ids, present = spread_of(rank, 2).pad(BATCH)
    assert ids.tolist() == rows
    assert present.sum(1).tolist() == [len(row) for row in BATCH[rank::2]]


def test_a_process_without_a_row_runs_one_padding_token():
    ids, present = spread_of(3, 4).pad(BATCH)
    assert ids.tolist() == [[0]] and not present.any()
