"""No rank may hold a tensor of size sequence² or sequence times vocabulary."""

from dataclasses import replace

import pytest

from sparselong.kernels.layer.cross_entropy import CHUNK_ROWS
from tests.distributed import training
from tests.distributed.test_parity import packed
from tests.distributed.training import Run, largest_tensors

TOKENS, VOCABULARY, RANKS = 4096, 1031, 4
RUN = Run([[[packed(TOKENS)]]], keep=True, vocabulary=VOCABULARY, layers=2)
# Plain attention on a CPU processes 256 queries of two heads at a time: sequence² / 8.
MOST_ELEMENTS = TOKENS**2 // 7
MOST_LOGITS = CHUNK_ROWS * VOCABULARY  # half of the logits of a shard


def test_no_rank_holds_sequence_squared_or_all_logits(pools):
    assert TOKENS // RANKS > CHUNK_ROWS
    for of_all, of_vocabulary in pools[RANKS].run(largest_tensors, RUN, RANKS):
        assert TOKENS**2 // 16 < of_all < MOST_ELEMENTS
        assert of_vocabulary == MOST_LOGITS


@pytest.mark.parametrize("piece", training.CHUNKS)
def test_missing_chunks_are_noticed(pools, piece):
    found = pools[RANKS].run(largest_tensors, replace(RUN, broken=piece), RANKS)
    for of_all, of_vocabulary in found:
        assert of_all > MOST_ELEMENTS or of_vocabulary > MOST_LOGITS


def test_an_unsharded_sequence_is_noticed(pools):
    whole = replace(RUN, steps=[[[packed(TOKENS)] * 2]])
    assert all(of_all > MOST_ELEMENTS for of_all, _ in pools[2].run(largest_tensors, whole, 1))
