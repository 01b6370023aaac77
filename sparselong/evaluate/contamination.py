"""Detection of evaluation items in the fine-tuning data.

An item whose text occurs in the training conversations measures memory. The check is the usual one:
an item is suspect if thirteen consecutive words (letters and digits only, lower case) of the item
with its right answer occur in a text of a training row. An item with fewer words must occur whole.
Only this run's `train.jsonl` is searched; the training data of the base model is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from sparselong.data import conversations

_NGRAM_WORDS = 13


def list_warnings(items_by_task: dict[str, list[str]], train_path: Path) -> list[str]:
    """Return one warning for each task with items in the training conversations."""
    by_row = [conversations.list_texts(row) for row in conversations.read(train_path)]
    texts = [text for texts in by_row for text in texts]
    warnings = []
    if items_by_task and (unread := sum(not texts for texts in by_row)):
        warnings.append(
            f"{unread:,} of {len(by_row):,} training rows are token ids, which are not searched"
        )
    for task, items in items_by_task.items():
        if found := find_contaminated(items, texts):
            warnings.append(
                f"{len(found)} of the {len(items)} items of {task} share {_NGRAM_WORDS} "
                f"consecutive words with the training data: the fine-tuned model may remember them"
            )
    return warnings


def find_contaminated(items: list[str], training_texts: Iterable[str]) -> list[int]:
    """Return the indices of items that share thirteen consecutive words with a training text."""
    owners: dict[tuple[str, ...], set[int]] = {}
    for index, item in enumerate(items):
        words = _words(item)
        for ngram in _ngrams(words, min(_NGRAM_WORDS, len(words))):
            owners.setdefault(ngram, set()).add(index)
    lengths = {len(ngram) for ngram in owners}
    found: set[int] = set()
    for text in training_texts:
        words = _words(text)
        for length in lengths:
            for ngram in _ngrams(words, length):
                found |= owners.get(ngram, set())
    return sorted(found)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _ngrams(words: list[str], length: int) -> Iterable[tuple[str, ...]]:
    if length == 0:
        return []
    return zip(*(words[start:] for start in range(length)), strict=False)
