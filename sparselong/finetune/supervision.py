"""The rows of training and evaluation with their labels, and how they are shown.

`data.conversations.tokenize` defines which tokens are supervised: everything that the model must
generate after the generation prompt, including the channel header. `LabelledRows` gives the stored
tokens (data/encoding.py) to the trainer, so that stages 03 and 04 measure the same tokens, and have
the same perplexity for the same model and conversations.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

import numpy

from sparselong.data import Encoded

IGNORED = -100
_GREEN, _GREY, _OFF = "\x1b[32m", "\x1b[90m", "\x1b[0m"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that would change a terminal or end a line in a log; tab and line feed may stay."""


class LabelledRows:
    """Conversations as `input_ids` and `labels`, read from disk on access.

    Their order is that of Axolotl's shuffle of the whole file by the seed, without the rows that
    are left out.

    Args:
        encoded: a prepared file's tokens.
        usable: the numbers of the rows that are used.
        seed: decides the order.
    """

    def __init__(self, encoded: Encoded, usable: Iterable[int], seed: int):
        self.encoded = encoded
        kept = set(usable)
        shuffled = numpy.random.default_rng(seed).permutation(len(encoded)).tolist()
        self.numbers = [number for number in shuffled if number in kept]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        return label(*self.encoded[self.numbers[row]])

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each row."""
        return [self.encoded.counts[number].tokens for number in self.numbers]

    @property
    def supervised_fraction(self) -> float:
        """Fraction of supervised tokens."""
        supervised = sum(self.encoded.counts[number].supervised for number in self.numbers)
        return supervised / sum(self.lengths)


def label(tokens: list[int], supervised: list[bool]) -> dict[str, list[int]]:
    """Return a row for the trainer: `input_ids`, and `labels` with IGNORED for context."""
    labels = [t if s else IGNORED for t, s in zip(tokens, supervised, strict=True)]
    return {"input_ids": tokens, "labels": labels}


def preview(rows: Iterable[Mapping[str, Any]], tokenizer: Any, colour: bool = False) -> str:
    """Return conversations as text with their supervised tokens marked, and where each ends.

    Args:
        rows: what `label` returns.
        tokenizer: turns tokens into text; control characters of it are shown as escapes.
        colour: whether supervised tokens are green and others grey (ANSI), as on a terminal;
            otherwise supervised tokens are enclosed in marks.
    """
    blocks = []
    for row in rows:
        parts = []
        for learned, pairs in groupby(
            zip(row["input_ids"], row["labels"], strict=True), lambda p: p[1] != IGNORED
        ):
            text = tokenizer.decode([token for token, _ in pairs])
            parts.append(_mark(_CONTROL.sub(_escape, text), learned, colour))
        supervised = sum(wanted != IGNORED for wanted in row["labels"])
        end = f"end: {len(row['labels']):,} tokens, {supervised:,} supervised"
        blocks.append("".join(parts) + f"\n--- {end} ---")
    legend = f"{_mark('supervised', True, colour)}, {_mark('context only', False, colour)}"
    return "\n\n".join([legend, *blocks]) + "\n"


def _mark(text: str, learned: bool, colour: bool) -> str:
    if not colour:
        return f"⟦{text}⟧" if learned else text
    start = _GREEN if learned else _GREY  # again on each line, for pagers that forget it
    return "\n".join(f"{start}{line}{_OFF}" for line in text.split("\n"))


def _escape(found: re.Match[str]) -> str:
    return f"\\x{ord(found[0]):02x}"
