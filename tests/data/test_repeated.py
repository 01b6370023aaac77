"""Rows that nearly repeat others: counted within train and against validation."""

import random

import pytest

from sparselong.config import load
from sparselong.data import conversations
from sparselong.data.overlap import find_repeated
from tests.conftest import ROOT, write_rows

DRAW = random.Random(0)
WORDS = [f"word{i}" for i in range(2000)]


def chat(question, answer, instructions=None):
    first = [{"role": "system", "content": instructions}] if instructions else []
    user = {"role": "user", "content": question}
    return {"messages": [*first, user, {"role": "assistant", "content": answer}]}


def text(count):
    return " ".join(DRAW.choices(WORDS, k=count))


def change(words, places):
    """Return the text with single words replaced, spread evenly, and other case and punctuation."""
    changed = words.upper().replace(" ", ", ").split(" ")
    for place in range(places):
        changed[(2 * place + 1) * len(changed) // (2 * places)] = f"other{place}"
    return " ".join(changed)


@pytest.mark.parametrize(
    ("changes", "repeated"),
    [(0, True), (4, True), (6, False), (30, False)],
    ids=["same", "84 % of the sequences", "76 %", "few"],
)
def test_a_row_is_repeated_if_four_fifths_of_its_sequences_are(changes, repeated):
    question, answer = text(100), text(100)
    changed = chat(question, change(answer, changes)) if changes else chat(question, answer)
    others = [chat(text(20), text(180)) for _ in range(20)]
    # Each changed word is in eight of the 193 sequences.
    said = find_repeated([*others, chat(question, answer), changed], [])
    assert said == (["train: 1 of 22 conversations nearly repeat earlier ones"] if repeated else [])


def test_validation_rows_are_compared_with_training_rows_only():
    rows = [chat(text(30), text(60)) for _ in range(10)]
    fresh = chat(text(30), text(60))
    assert find_repeated(rows, [fresh, fresh]) == []
    (said,) = find_repeated(rows, [fresh, rows[3], rows[4]])
    assert said.startswith("warning: validation: 2 of 3 conversations nearly repeat training")


def test_short_rows_count_if_they_are_the_same():
    rows = [chat("One?", "Yes."), chat("Two?", "Yes."), chat("one", "yes"), {"text": "One? Yes!"}]
    assert find_repeated(rows, []) == ["train: 2 of 4 conversations nearly repeat earlier ones"]


def test_shared_instructions_and_weights_do_not_make_rows_repeat():
    shared = text(300)
    rows = [chat(text(5), text(20), shared) for _ in range(10)]
    assert find_repeated(rows * 3, []) == []


def test_token_rows_are_compared_by_their_tokens():
    rows = [{"input_ids": [*range(n, n + 20)]} for n in (0, 100, 0)]
    assert find_repeated(rows, []) == ["train: 1 of 3 conversations nearly repeat earlier ones"]


def test_many_sequences_are_sampled(monkeypatch):
    rows = [chat(text(100), text(400)) for _ in range(20)]
    wanted = find_repeated([*rows, rows[0] | {}], [rows[1] | {}])
    monkeypatch.setattr("sparselong.data.overlap.sequences.MOST_HASHES", 500)
    assert find_repeated([*rows, rows[0] | {}], [rows[1] | {}]) == wanted and len(wanted) == 2


def test_repeated_rows_are_told_by_every_stage(tmp_path):
    rows = [chat(f"What is {n}?", f"It is {n}.") for n in range(20)] + [
        chat("What is 3?", "It is 3.")
    ]
    config = load(
        ROOT / "configs/tiny.yaml", [f"data.train={write_rows(tmp_path / 'a.jsonl', rows)}"]
    )
    conversations.prepare(config, tmp_path / "run")
    (said,) = conversations.read_remarks(tmp_path / "run")
    assert "nearly repeat" in said
