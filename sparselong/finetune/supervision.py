"""The rows of training and evaluation with their labels, and how they are shown.

`data.conversations.tokenize` defines which tokens are supervised: everything that the model must
generate after the generation prompt, including the channel header. `LabelledRows` gives the stored
tokens (data/encoding.py) to the trainer, so that stages 03 and 04 measure the same tokens, and have
the same perplexity for the same model and conversations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

import numpy

from sparselong.data import Encoded

IGNORED = -100
_GREEN, _GREY, _OFF = "\x1b[32m", "\x1b[90m", "\x1b[0m"


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


def preview(rows: Iterable[Mapping[str, Any]], tokenizer: Any) -> str:
    """Return conversations as text, supervised tokens green, others grey (ANSI colours)."""
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
    legend = f"{_GREEN}green: supervised{_OFF}, {_GREY}grey: context only{_OFF}"
    return "\n\n".join([legend, *blocks]) + "\n"
