"""Rows with labels from our own tokenization, in Axolotl's order."""

import datasets
import pytest

from sparselong.config import load
from sparselong.data import Encoded, encode_files
from sparselong.finetune.supervision import IGNORED, LabelledRows
from sparselong.model.tokenizer import load_tokenizer
from tests.conftest import ROOT, write_rows

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


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, untrained_base, tokenizer) -> Encoded:
    folder = tmp_path_factory.mktemp("supervision")
    path = write_rows(folder / "rows.jsonl", [{"messages": m} for m in CONVERSATIONS.values()])
    config = load(ROOT / "configs/tiny.yaml", [f"data.train={path}", f"data.validation={path}"])
    return encode_files(config, folder, tokenizer).train


def test_each_row_gets_its_own_labels(tokenizer, encoded):
    rows = LabelledRows(encoded, range(len(encoded)), seed=5)
    assert sorted(rows.numbers) == [0, 1, 2, 3] != rows.numbers
    names = list(CONVERSATIONS)
    for number, row in zip(rows.numbers, rows, strict=True):
        learned = [t for t in row["labels"] if t != IGNORED]
        assert tokenizer.decode(learned) == "".join(LEARNED[names[number]])
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            assert label in (token, IGNORED)
    learned = sum(label != IGNORED for row in rows for label in row["labels"])
    assert rows.lengths == [len(row["labels"]) for row in rows]
    assert rows.supervised_fraction == learned / sum(rows.lengths)


def test_the_order_is_that_of_axolotls_shuffle(encoded):
    """Axolotl shuffles a dataset by its seed, then drops rows; results of earlier versions hold."""
    shuffled = datasets.Dataset.from_dict({"row": [0, 1, 2, 3]}).shuffle(seed=7)["row"]
    assert LabelledRows(encoded, [0, 1, 3], seed=7).numbers == [n for n in shuffled if n != 2]
