"""Labels from our own tokenization, on the rows of Axolotl's chat strategy."""

import datetime
import json

import datasets
import pytest

from sparselong.data import conversations
from sparselong.errors import StageError
from sparselong.finetune.supervision import IGNORED, relabel, supervised_fraction
from sparselong.model.tokenizer import load_tokenizer
from tests.conftest import write_rows

CONVERSATIONS = {
    "single": [
        {"role": "user", "content": "What is two and two?"},
        {"role": "assistant", "content": "Four."},
    ],
    "several": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "No."},
    ],
    "thinking": [
        {"role": "user", "content": "Three?"},
        {"role": "assistant", "thinking": "Hm, three.", "content": "Perhaps."},
    ],
    "thinking in each turn": [
        {"role": "user", "content": "Four?"},
        {"role": "assistant", "thinking": "Dropped.", "content": "Aye."},
        {"role": "user", "content": "Five?"},
        {"role": "assistant", "thinking": "Kept.", "content": "Nay."},
    ],
}
# What the model must generate, turn by turn.
LEARNED = {
    "single": ["<|channel|>final<|message|>Four.<|return|>"],
    "several": [
        "<|channel|>final<|message|>Yes.<|end|>",
        "<|channel|>final<|message|>No.<|return|>",
    ],
    "thinking": [
        "<|channel|>analysis<|message|>Hm, three.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Perhaps.<|return|>"
    ],
    "thinking in each turn": [
        "<|channel|>final<|message|>Aye.<|end|>",
        "<|channel|>analysis<|message|>Kept.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Nay.<|return|>",
    ],
}


@pytest.fixture(scope="module")
def tokenizer(untrained_base):
    return load_tokenizer(untrained_base)


@pytest.fixture
def source(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", [{"messages": m} for m in CONVERSATIONS.values()])


def tokenized(names, tokenizer) -> datasets.Dataset:
    """Rows as Axolotl's loader produces them, with labels other than ours."""
    texts = [tokenizer.apply_chat_template(CONVERSATIONS[n], tokenize=False) for n in names]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return datasets.Dataset.from_dict(
        {"input_ids": ids, "labels": [[IGNORED] * len(i) for i in ids]}
    )


def test_each_row_gets_its_own_labels_in_any_order(tokenizer, source):
    names = ["thinking in each turn", "single", "thinking", "several"]
    rows = relabel(tokenized(names, tokenizer), source, tokenizer, "assistant")
    for name, row in zip(names, rows, strict=True):
        learned = [t for t in row["labels"] if t != IGNORED]
        assert tokenizer.decode(learned) == "".join(LEARNED[name])
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            assert label in (token, IGNORED)


def test_stage_04_counts_the_same_tokens(tokenizer, source):
    rows = relabel(tokenized(list(CONVERSATIONS), tokenizer), source, tokenizer, "assistant")
    today = datetime.date.today()
    for read, row in zip(conversations.read(source), rows, strict=True):
        _, supervised = conversations.tokenize(read, tokenizer, "assistant", today)
        assert supervised == [label != IGNORED for label in row["labels"]]


def test_train_on_all_learns_from_every_token(tokenizer, source):
    rows = relabel(tokenized(["several", "thinking"], tokenizer), source, tokenizer, "all")
    assert all(row["labels"] == row["input_ids"] for row in rows)
    assert supervised_fraction(rows) == 1.0


def test_omitted_rows_do_not_matter_and_foreign_rows_are_refused(tokenizer, source):
    rows = relabel(tokenized(["thinking"], tokenizer), source, tokenizer, "assistant")
    assert len(rows) == 1
    source.write_text(json.dumps({"messages": CONVERSATIONS["single"]}) + "\n")
    with pytest.raises(StageError, match="renders a conversation differently") as refusal:
        relabel(tokenized(["thinking"], tokenizer), source, tokenizer, "assistant")
    assert "Three?" in refusal.value.found
