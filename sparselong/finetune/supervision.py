"""Which tokens are learned from: labels, their fraction, a coloured preview of some conversations.

There is one definition, `data.conversations.tokenize`: an assistant's turn is all that the model
must write itself after the generation prompt, with the channel's header. Axolotl's chat strategy
labels a turn's text and end, but of harmony's header nothing (`<|channel|>final<|message|>`) or, in
a turn with reasoning, a part. So Axolotl tokenizes, leaves out what is too long and packs, and
`relabel` puts our labels on its rows before they are packed. Stages 03 and 04 thereby measure the
same tokens, and their perplexities of one model on one split are one number.
"""

from __future__ import annotations

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
    """Axolotl's tokenized rows with the labels that `conversations.tokenize` gives.

    Args:
        dataset: a datasets.Dataset with `input_ids` and `labels`; any of the rows, in any order.
        source: the conversations that it was made from.
        tokenizer: the one that it was made with.
        train_on: as for `conversations.tokenize`.

    Raises:
        StageError: a row's tokens are not those of a conversation of `source`.
    """
    learned: dict[bytes, bytes] = {}
    for messages in conversations.read(source):
        tokens, supervised = conversations.tokenize(messages, tokenizer, train_on)
        learned[_digest(tokens)] = bytes(supervised)

    def label(row: Mapping[str, Any]) -> dict[str, list[int]]:
        tokens = row["input_ids"]
        supervised = learned.get(_digest(tokens))
        if supervised is None:
            raise StageError(
                "Axolotl renders a conversation otherwise than this project",
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
