"""Slices of rows whose experts are exchanged: the same number in every process, whatever it has."""

from typing import Any

import pytest

from sparselong.parallel.experts import ShardedExperts
from sparselong.parallel.placement import Placement

GROUP: Any = None


def divide(most: int, *shapes: tuple[int, int]) -> list[tuple[int, ...]]:
    """Return each slice's rows of processes with (sequences, tokens of each)."""
    rows = tuple(sequences * tokens for sequences, tokens in shapes)
    counts = tuple(sequences for sequences, _ in shapes)
    whole = ShardedExperts(Placement(0, len(shapes)), GROUP, rows, sequences=counts)
    parts = whole.divide(most)
    assert parts is not None and all(part.placement == whole.placement for part in parts)
    return [part.rows or () for part in parts]


@pytest.mark.parametrize(
    ("most", "shapes", "expected"),
    [
        (50, [(1, 100), (1, 40)], [(50, 20), (50, 20)]),
        (40, [(1, 100), (1, 50)], [(33, 16), (33, 17), (34, 17)]),
        (100, [(1, 100), (1, 7)], [(100, 7)]),
        (30, [(2, 50), (1, 60)], [(24, 15), (26, 15), (24, 15), (26, 15)]),
        (10, [(1, 100), (1, 2)], [(50, 1), (50, 1)]),  # no slice without rows
        (10, [(1, 0), (1, 100)], [(0, 100)]),
    ],
)
def test_processes_divide_their_rows_into_as_many_slices(most, shapes, expected):
    assert divide(most, *shapes) == expected


def test_equal_rows_need_no_exchange_of_their_own():
    assert ShardedExperts(Placement(0, 2), GROUP).divide(10) is None
