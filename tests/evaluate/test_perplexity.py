"""Perplexity against sums by hand, independent of batches and padding."""

import functools
import math
from types import SimpleNamespace

import pyarrow
import pytest
import torch

from sparselong.data import Encoded
from sparselong.evaluate import perplexity
from sparselong.evaluate.perplexity import Sample

# P[a][b]: the fake model's probability of b after a. Token 0 is also the padding token. It is
# nearly impossible after any token, so counted padding would be obvious.
P = torch.tensor(
    [
        [0.01, 0.50, 0.25, 0.24],
        [0.01, 0.09, 0.50, 0.40],
        [0.01, 0.49, 0.25, 0.25],
        [0.01, 0.19, 0.30, 0.50],
    ]
)
SAMPLES = [
    Sample([1, 2, 3], [False, False, True]),
    Sample([1, 3, 3, 2, 1, 2], [False, True, True, False, True, True]),
    Sample([2, 1], [True, True]),
]


class Bigram:
    """A causal model with `model` and `lm_head`, like those of transformers."""

    def __init__(self):
        self.lm_head = torch.nn.Linear(4, 4, bias=False)
        self.lm_head.weight.data = torch.eye(4)
        self.shapes = []

    def model(self, ids, use_cache):
        self.shapes.append(tuple(ids.shape))
        return SimpleNamespace(last_hidden_state=P.log()[ids])


def test_sums_by_hand():
    result = perplexity.measure(Bigram(), SAMPLES, 8)
    supervised = [[0.25], [0.40, 0.50, 0.49, 0.50], [0.49]]
    rest = [0.50, 0.30]
    nll = -sum(math.log(p) for row in supervised for p in row)
    assert result["supervised"]["tokens"] == 6
    assert result["supervised"]["nll"] == pytest.approx(nll, rel=1e-6)
    assert result["supervised"]["perplexity"] == pytest.approx(math.exp(nll / 6), rel=1e-6)
    assert result["all"]["tokens"] == 8
    assert result["all"]["nll"] == pytest.approx(nll - sum(map(math.log, rest)), rel=1e-6)
    assert [tokens for _, tokens in result["conversations"]] == [1, 4, 1]
    for (found, _), row in zip(result["conversations"], supervised, strict=True):
        assert found == pytest.approx(-sum(map(math.log, row)), rel=1e-6)


def test_buckets_by_hand():
    """Positions 1 | 2 | 3 | 4-5; position 3 has no supervised token."""
    rows = perplexity.measure(Bigram(), SAMPLES, 8)["by_position"]
    expected = {(1, 1): [0.40, 0.49], (2, 2): [0.25, 0.50], (4, 5): [0.49, 0.50]}
    assert [(row["first"], row["last"]) for row in rows] == list(expected)
    for row, probabilities in zip(rows, expected.values(), strict=True):
        assert row["tokens"] == 2
        assert row["nll"] == pytest.approx(-sum(map(math.log, probabilities)), rel=1e-6)


def test_buckets_hold_every_supervised_token():
    long = Sample([1, 2, 3] * 100, [True] * 300)
    result = perplexity.measure(Bigram(), [long, *SAMPLES], 2)
    rows = result["by_position"]
    assert rows[-1]["first"] == 256 and rows[-1]["tokens"] == 300 - 256
    assert [row["first"] for row in rows[1:]] == [row["last"] + 1 for row in rows[:-1]]
    assert sum(row["tokens"] for row in rows) == result["supervised"]["tokens"]
    assert sum(row["nll"] for row in rows) == pytest.approx(result["supervised"]["nll"])


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_batches_and_chunks_change_nothing(batch_size, monkeypatch):
    whole = perplexity.measure(Bigram(), SAMPLES, 8)
    chunked = functools.partial(perplexity.token_losses, chunk_rows=3)
    monkeypatch.setattr(perplexity, "token_losses", chunked)
    model = Bigram()
    result = perplexity.measure(model, SAMPLES, batch_size)
    assert len(model.shapes) == math.ceil(3 / batch_size)
    found, expected = torch.tensor(result["conversations"]), torch.tensor(whole["conversations"])
    torch.testing.assert_close(found, expected)
    assert result["all"]["nll"] == pytest.approx(whole["all"]["nll"])


def test_long_conversations_use_smaller_batches(monkeypatch):
    monkeypatch.setattr(perplexity, "_BATCH_TOKENS", 7)
    model = Bigram()
    perplexity.measure(model, SAMPLES, 8)
    assert model.shapes == [(1, 6), (2, 3)]


def test_samples_are_the_files_rows(tmp_path):
    table = pyarrow.Table.from_pylist([vars(sample) for sample in SAMPLES])
    assert perplexity.load_samples(Encoded(tmp_path, table), [2, 0]) == [SAMPLES[2], SAMPLES[0]]
