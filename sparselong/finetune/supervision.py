"""Which tokens are learned from: the fraction, and a coloured preview of some conversations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from sparselong.errors import StageError

IGNORED = -100
_GREEN, _GREY, _OFF = "\x1b[32m", "\x1b[90m", "\x1b[0m"


def supervised_fraction(rows: Iterable[Mapping[str, Any]]) -> float:
    """Supervised tokens over all tokens of rows with `labels`.

    Raises:
        StageError: not one token is supervised.
    """
    total = supervised = 0
    for row in rows:
        total += len(row["labels"])
        supervised += sum(label != IGNORED for label in row["labels"])
    if not supervised:
        raise StageError(
            "nothing would be learned: 0 % of the tokens are supervised",
            "assistant turns that the chat template renders and that fit into sequence_len",
            f"{total} tokens, all masked",
            "check the rows' roles and data.train_on, or raise sequence_len",
        )
    return supervised / total


def preview(rows: Iterable[Mapping[str, Any]], tokenizer: Any) -> str:
    """Conversations as text: supervised tokens green, the others grey (ANSI colours)."""
    blocks = []
    for row in rows:
        parts = []
        for learned, pairs in groupby(
            zip(row["input_ids"], row["labels"], strict=True), lambda p: p[1] != IGNORED
        ):
            text = tokenizer.decode([token for token, _ in pairs])
            colour = _GREEN if learned else _GREY
            parts += [f"{colour}{line}{_OFF}" for line in text.split("\n")][:1]
            parts += [f"\n{colour}{line}{_OFF}" for line in text.split("\n")[1:]]
        blocks.append("".join(parts))
    legend = f"{_GREEN}green: learned from{_OFF}, {_GREY}grey: read only{_OFF}"
    return "\n\n".join([legend, *blocks]) + "\n"
