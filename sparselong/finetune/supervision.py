"""Set the labels of supervised tokens, measure their fraction, and preview some conversations.

`data.conversations.tokenize` defines which tokens are supervised: everything that the model must
generate after the generation prompt, including the channel header. Axolotl's chat strategy labels a
turn's text and end, but none of harmony's header (`<|channel|>final<|message|>`), or only a part of
it in a turn with reasoning. So Axolotl tokenizes the rows and drops those that are too long, and
`relabel` sets our labels before the rows are packed. Stages 03 and 04 therefore measure the same
tokens, and give the same perplexity for the same model and split.
"""

from __future__ import annotations

import datetime
import hashlib
from array import array
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from sparselong.data import conversations
from sparselong.errors import StageError

IGNORED = -100
_GREEN, _GREY, _OFF = "\x1b[32m", "\x1b[90m", "\x1b[0m"


def relabel(
    dataset: Any, source: Path, tokenizer: Any, train_on: Literal["assistant", "all"]
) -> Any:
    """Return Axolotl's tokenized rows with the labels of `conversations.tokenize`.

    Args:
        dataset: a datasets.Dataset with `input_ids` and `labels`; any subset of the rows, in any
            order.
        source: file of the conversations that were tokenized.
        tokenizer: the tokenizer that was used.
        train_on: as for `conversations.tokenize`.

    Raises:
        StageError: a row's tokens match no conversation of `source`.
    """
    learned: dict[bytes, bytes] = {}
    for row in conversations.read(source):
        today = datetime.date.today()
        tokens, supervised = conversations.tokenize(row, tokenizer, train_on, today)
        learned[_digest(tokens)] = bytes(supervised)

    def label(row: Mapping[str, Any]) -> dict[str, list[int]]:
        tokens = row["input_ids"]
        supervised = learned.get(_digest(tokens))
        if supervised is None:
            raise StageError(
                "Axolotl renders a conversation differently from this project",
                f"the tokens of a row of {source} in the model's chat template",
                tokenizer.decode(tokens)[-200:],
                "use gpt-oss's own chat_template.jinja in the model directory",
            )
        return {
            "labels": [t if s else IGNORED for t, s in zip(tokens, supervised, strict=True)],
        }

    return dataset.map(label, load_from_cache_file=False)


def _digest(tokens: list[int]) -> bytes:
    return hashlib.blake2b(array("q", tokens).tobytes(), digest_size=16).digest()


def supervised_fraction(rows: Iterable[Mapping[str, Any]]) -> float:
    """Return the fraction of supervised tokens in rows with `labels`.

    Raises:
        StageError: no token is supervised.
    """
    total = supervised = 0
    for row in rows:
        total += len(row["labels"])
        supervised += sum(label != IGNORED for label in row["labels"])
    if not supervised:
        raise StageError(
            "there is nothing to learn: 0 % of the tokens are supervised",
            "assistant turns that the chat template renders and that fit into sequence_len",
            f"{total} tokens, all masked",
            "check the rows' roles and data.train_on, or raise sequence_len",
        )
    return supervised / total


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
