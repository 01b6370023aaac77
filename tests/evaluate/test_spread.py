"""Batches that several processes evaluate together."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from sparselong.evaluate.spread import Spread, pad


@pytest.mark.parametrize(
    ("size", "rounds"),
    [
        (1, [[[4, 1]], [[0, 2]], [[3]]]),
        (2, [[[4, 1], [0, 2]], [[3], []]]),
        (4, [[[4, 1], [0, 2], [3], []]]),
    ],
)
def test_each_process_s_pass_is_a_whole_batch(size, rounds):
    spread = Spread(cast(Any, SimpleNamespace(data_size=size)))
    assert list(spread.rounds([[4, 1], [0, 2], [3]])) == rounds


def test_texts_are_padded_to_the_longest_of_the_pass():
    ids, present = pad([[1, 2, 3], [4]])
    assert ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert present.tolist() == [[True, True, True], [True, False, False]]


def test_a_process_without_a_text_runs_one_padding_token():
    ids, present = pad([])
    assert ids.tolist() == [[0]] and not present.any()
