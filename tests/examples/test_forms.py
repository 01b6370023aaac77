"""Each trainer on each form of batches: the first loss is that of separate conversations."""

import pytest

from tests.conftest import write_rows
from tests.examples.forms import losses_of, tokenize, train
from tests.examples.separate import MESSAGES, separate_loss

CASES = [
    *(
        ("transformers", trained, form)
        for trained in ("lora", "full")
        for form in ("packing", "padding")
    ),
    ("TRL", "lora", "padding"),
    *(("TRL", "full", form) for form in ("packing", "padding-free", "padding")),
]


@pytest.fixture(scope="module")
def expected(untrained_base) -> float:
    rows = tokenize(untrained_base)
    return separate_loss(untrained_base, rows, [[1] * len(row) for row in rows])


@pytest.mark.parametrize("front, trained, form", CASES)
def test_the_first_loss(front, trained, form, untrained_base, tmp_path, expected):
    data = write_rows(tmp_path / "data.jsonl", MESSAGES)
    trainer = train(
        front, trained, form, untrained_base, data, tmp_path / "out", steps=1, batch=len(MESSAGES)
    )
    assert (len(trainer.train_dataset) < len(MESSAGES)) is (form == "packing")
    assert losses_of(trainer) == [pytest.approx(expected, rel=1e-5)]
