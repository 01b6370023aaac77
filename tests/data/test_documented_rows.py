"""docs/data.md: its rows are read and trained as it says, and its config is one."""

from __future__ import annotations

import copy
import datetime
import json
import re
from importlib.resources import files

import pytest

from sparselong.config import load
from sparselong.data import conversations
from sparselong.data.rows import Remarks, read_rows
from tests.conftest import ROOT

PAGE = (ROOT / "docs/data.md").read_text("utf-8")
ROWS = [
    row
    for block in re.findall(r"```jsonl\n(.*?)```", PAGE, re.DOTALL)
    for row in block.split("\n")
    if row
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: next(iter(json.loads(row))))
def test_a_row_is_read_whole_and_trains(row, tmp_path, harmony_tokenizer):
    tokenizer = copy.copy(harmony_tokenizer)
    tokenizer.chat_template = (files("trl") / "chat_templates/gptoss.jinja").read_text("utf-8")
    path, remarks = tmp_path / "rows.jsonl", Remarks()
    path.write_text(row + "\n", encoding="utf-8")
    (found,) = read_rows(path, remarks)
    assert not remarks.ignored
    ids, supervised = conversations.tokenize(
        found, tokenizer, "assistant", datetime.date(2025, 8, 5)
    )
    trained = tokenizer.decode([t for t, learned in zip(ids, supervised, strict=True) if learned])
    assert any(supervised) and "Hm?" not in trained
    assert "Hm?" not in row or "Reasoning: low" in tokenizer.decode(ids)


def test_the_config_is_complete(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    path = tmp_path / "my.yaml"
    path.write_text(text, encoding="utf-8")
    shares = load(path).data.shares
    assert [(each.source, each.weight) for each in shares] == [
        ("chats.jsonl", 3),
        ("alpaca.csv", 1),
    ]
    (words,) = re.findall(r"`'(data\.train=.*?)'`", PAGE)
    assert [each.source for each in load(path, [words]).data.shares] == [
        "chats.jsonl",
        "alpaca.csv",
    ]
