"""The prepared text as one file: token ids in two bytes each, compressed."""

from __future__ import annotations

import io
import lzma
from pathlib import Path
from typing import NamedTuple

import numpy as np

NAME = "corpus.npz.xz"


class Prepared(NamedTuple):
    """What the model is trained and measured on; all documents end in the end of a text.

    Attributes:
        train: uint16 tokens of the training documents.
        conversations: uint16 tokens of conversations in harmony.
        tasks: uint16 tokens of solved retrieval tasks.
        answered: uint8 bits, one for each token of `tasks`: it belongs to an answer.
        held_out: uint16 tokens of the held-out documents.
        marks: uint16 [3]: the tokens that begin a text, end a turn, and end a text.
    """

    train: np.ndarray
    conversations: np.ndarray
    tasks: np.ndarray
    answered: np.ndarray
    held_out: np.ndarray
    marks: np.ndarray


def save(prepared: Prepared, path: Path) -> None:
    """Write the file; the same arrays give the same bytes."""
    buffer = io.BytesIO()
    for array in prepared:
        np.save(buffer, array)
    path.write_bytes(lzma.compress(buffer.getvalue(), preset=6))


def load(path: Path) -> Prepared:
    """Return the arrays of a file.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        buffer = io.BytesIO(lzma.decompress(path.read_bytes()))
    except lzma.LZMAError as error:
        raise ValueError(f"{path}: {error}; copy it again, or prepare the text again") from error
    return Prepared(*(np.load(buffer) for _ in Prepared._fields))


def documents_of(tokens: np.ndarray, end: int) -> list[np.ndarray]:
    """Return the documents of a stream, each with the token that ends it."""
    return np.split(tokens, np.flatnonzero(tokens == end) + 1)[:-1]
