"""Conversations that nearly repeat others."""

from __future__ import annotations

from itertools import pairwise

import numpy

from sparselong.data.overlap.sequences import Codes, find_words, hash_sequences, thin_out
from sparselong.data.rows import Conversation, list_texts

REPEATED = "warning: validation:"
"""How the sentence about validation rows that repeat training rows begins."""
_WORDS, _ALIKE = 8, 0.8


def find_repeated(train: list[Conversation], validation: list[Conversation]) -> list[str]:
    """Return a sentence for each file that repeats training rows nearly word by word.

    A row counts if 80 % of its sequences of eight words (of all its words, if there are fewer)
    occur in an earlier training row. Instructions are left out, because many rows share them; so
    is a row that a source's weight repeats.
    """
    own = list({id(row): row for row in train}.values())
    codes = Codes()
    hashes = thin_out([_hash_words(row, codes) for row in (*own, *validation)])
    bounds = numpy.cumsum([0, *map(len, hashes)])
    rows = numpy.repeat(numpy.arange(len(hashes)), numpy.diff(bounds))
    _, first, which = numpy.unique(
        numpy.concatenate(hashes), return_index=True, return_inverse=True
    )
    first_row = rows[first[which]]  # in which row each sequence occurs first
    seen = first_row < numpy.minimum(rows, len(own))
    shares = numpy.array(
        [seen[start:end].mean() if end > start else 0.0 for start, end in pairwise(bounds)]
    )
    alike = shares >= _ALIKE
    counts = int(alike[: len(own)].sum()), int(alike[len(own) :].sum())
    said = []
    if counts[0]:
        said.append(
            f"train: {counts[0]:,} of {len(own):,} conversations nearly repeat earlier ones"
        )
    if counts[1]:
        said.append(
            f"{REPEATED} {counts[1]:,} of {len(validation):,} conversations nearly repeat "
            "training conversations, which makes the validation loss look too good"
        )
    return said


def _hash_words(row: Conversation, codes: Codes) -> numpy.ndarray:
    """Return a hash of each sequence of eight words of a row without its instructions."""
    if "messages" in row:
        told = [each for each in row["messages"] if each["role"] not in ("system", "developer")]
        row = {"messages": told}
    words = [word for text in list_texts(row) for word in find_words(text)]
    words = words or [str(token) for token in row.get("input_ids", ())]
    none = (0, numpy.zeros(0, numpy.uint64))
    *_, (_, hashes) = none, *hash_sequences(codes.number(words), _WORDS)
    return numpy.unique(hashes)
