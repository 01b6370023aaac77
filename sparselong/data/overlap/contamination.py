"""Detection of evaluation items in the fine-tuning data.

An item whose text occurs in the training conversations measures memory. The check is the usual one:
an item is suspect if thirteen consecutive words of the item with its right answer occur in a text
of a training row. An item with fewer words must occur whole. Only this run's `train.jsonl` is
searched; the training data of the base model is unknown.

The rows are read once for all tasks, which takes less time than encoding them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy

from sparselong.data import conversations
from sparselong.data.overlap.sequences import Codes, find_words, hash_sequences, thin_out

_NGRAM_WORDS = 13
_SIDES = ("left", "right")


def warn_of_items(items_by_task: dict[str, list[str]], train_path: Path) -> list[str]:
    """Return one warning for each task with items in the training conversations."""
    if not items_by_task:
        return []
    by_row = [conversations.list_texts(row) for row in conversations.read(train_path)]
    texts = [text for texts in by_row for text in texts]
    warnings = []
    if unread := sum(not texts for texts in by_row):
        warnings.append(
            f"{unread:,} of {len(by_row):,} training rows are token ids, which are not searched"
        )
    owners = [task for task, items in items_by_task.items() for _ in items]
    found = find_contaminated([item for items in items_by_task.values() for item in items], texts)
    for task, items in items_by_task.items():
        if count := sum(owners[index] == task for index in found):
            warnings.append(
                f"{count:,} of the {len(items):,} items of {task} share {_NGRAM_WORDS} "
                f"consecutive words with the training data: the fine-tuned model may remember them"
            )
    return warnings


class _Table(NamedTuple):
    """Sequences of items, all of one length.

    Attributes:
        hashes: uint64, ascending.
        owners: the item of each.
    """

    hashes: numpy.ndarray
    owners: numpy.ndarray

    def find(self, hashes: numpy.ndarray) -> set[int]:
        """Return the items that have one of these sequences."""
        places = numpy.minimum(numpy.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        found: set[int] = set()
        for each in numpy.unique(hashes[self.hashes[places] == hashes]):
            start, end = (numpy.searchsorted(self.hashes, each, side) for side in _SIDES)
            found.update(self.owners[start:end].tolist())
        return found


def find_contaminated(items: Sequence[str], training_texts: Iterable[str]) -> list[int]:
    """Return the indices of items that share thirteen consecutive words with a training text."""
    codes = Codes()
    tables = _index(items, codes)
    found: set[int] = set()
    for text in training_texts:
        numbers = codes.number(find_words(text))
        for length, hashes in hash_sequences(numbers, max(tables, default=0)):
            if length in tables:
                found |= tables[length].find(hashes)
    return sorted(found)


def _index(items: Sequence[str], codes: Codes) -> dict[int, _Table]:
    """Return the items' longest sequences by their length, which is below 13 for short items."""
    by_length: dict[int, list[tuple[int, numpy.ndarray]]] = {}
    for index, item in enumerate(items):
        *_, longest = None, *hash_sequences(codes.number(find_words(item)), _NGRAM_WORDS)
        if longest is not None:
            length, hashes = longest
            by_length.setdefault(length, []).append((index, hashes))
    return {length: _tabulate(rows) for length, rows in by_length.items()}


def _tabulate(rows: list[tuple[int, numpy.ndarray]]) -> _Table:
    indices, hashes = zip(*rows, strict=True)
    kept = thin_out(list(hashes))
    joined = numpy.concatenate(kept)
    owners = numpy.repeat(indices, [len(each) for each in kept])
    order = numpy.argsort(joined, kind="stable")
    return _Table(joined[order], owners[order])
