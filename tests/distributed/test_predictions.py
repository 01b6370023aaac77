"""The user's function gets the same tokens in the same order, however many processes there are."""

import random
from pathlib import Path

import numpy
import pytest
import torch

from tests.distributed.pool import Pool
from tests.distributed.predictions import collect, collect_with

FUNCTION = """
import numpy

def keep(predictions, labels):
    assert predictions.dtype == labels.dtype == numpy.int64
    numpy.save({path!r}, numpy.stack([predictions, labels]))
    return {{"tokens": len(labels)}}
"""


@pytest.fixture(scope="module")
def model(untrained_base):
    from sparselong.model.loading import load_model

    return load_model(untrained_base, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def rows() -> list:
    source = random.Random(1)
    lengths = [40, 7, 33, 2, 61, 18, 25]
    texts = [[source.randrange(2048) for _ in range(length)] for length in lengths]
    rows = [(text, [source.random() < 0.5 for _ in text]) for text in texts]
    rows[3] = (texts[3], [True, False])  # the first token is never predicted: nothing to collect
    return rows


@pytest.fixture(scope="module")
def wanted(model, rows) -> numpy.ndarray:
    """Predictions and labels, one conversation after another, from whole logits."""
    found = []
    for tokens, supervised in rows:
        with torch.no_grad():
            best = model(torch.tensor([tokens]), use_cache=False).logits[0, :-1].argmax(1)
        learned = torch.tensor(supervised[1:])
        found.append(torch.stack([best[learned], torch.tensor(tokens[1:])[learned]]))
    return torch.cat(found, 1).numpy()


def write_function(folder: Path) -> tuple[str, Path]:
    kept = folder / "kept.npy"
    (folder / "figures.py").write_text(FUNCTION.format(path=str(kept)))
    return f"{folder / 'figures.py'}:keep", kept


def test_one_process_collects_what_logits_say(model, rows, wanted, tmp_path):
    place, kept = write_function(tmp_path)
    figures = collect_with(model, rows, place, None)
    assert figures == {"tokens": wanted.shape[1]} and wanted.shape[1] > 60
    assert numpy.array_equal(numpy.load(kept), wanted)


@pytest.mark.parametrize(
    ("size", "context", "experts"), [(2, 2, 1), (2, 1, 1), (2, 1, 2), (2, 2, 2), (4, 2, 4)]
)
def test_several_processes_collect_the_same(
    pools: dict[int, Pool], untrained_base, rows, wanted, tmp_path, size, context, experts
):
    place, kept = write_function(tmp_path)
    found = pools[size].run(collect, untrained_base, rows, place, context, experts)
    assert found == [{"tokens": wanted.shape[1]}] + [{}] * (size - 1)
    assert numpy.array_equal(numpy.load(kept), wanted)


@pytest.mark.parametrize("broken", ["order", "tokens of others"])
def test_without_a_piece_that_is_noticed(pools, untrained_base, rows, wanted, tmp_path, broken):
    place, kept = write_function(tmp_path)
    pools[2].run(collect, untrained_base, rows, place, 2, 1, broken)
    assert not numpy.array_equal(numpy.load(kept), wanted)
