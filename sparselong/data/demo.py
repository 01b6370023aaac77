"""The demo's data, made from the corpus: chat rows for fine-tuning and multiple-choice items.

The fine-tuning task asks what a name of the standard library does. An answer first states the
name's kind, module and parameters in fixed words, then quotes the documentation's first paragraph.
A short fine-tuning run learns this form. A base model trained only to continue paragraphs does not
know it. Training rows come from training documents; validation rows and multiple-choice items come
from held-out documents.

The items follow hellaswag: a context, its true continuation, and three continuations of equal
length from other documents.
"""

import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from sparselong.data.corpus import Document, Entry, Split, documents, is_prose
from sparselong.errors import StageError

_TRAIN_ROWS = 1200
_VALIDATION_ROWS = 130
_LONGEST_ANSWER_CHARACTERS = 700
_CONTEXT_TOKENS = (40, 60)
_ENDING_TOKENS = (12, 16)
_BRIEF_INSTRUCTION = "Answer in one sentence, without naming the parameters."

Messages = list[dict[str, str]]
# (tokens, characters) → endings of that size: document, first word, index after the last.
_Stretches = dict[tuple[int, int], list[tuple[int, int, int]]]


@dataclass(frozen=True)
class _Prose:
    """Prose of a held-out document: its words and the token count of each after a space."""

    title: str
    words: list[str]
    tokens: list[int]


def write_demo_data(out_dir: Path, seed: int) -> None:
    """Write train.jsonl (about 1,200 rows) and validation.jsonl (about 130) of chat messages.

    A row is {"messages": [...]}. One row in ten has two exchanges, one in fifteen has a system
    message that asks for a short answer, and one in twenty has `thinking` in the answer.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    files: tuple[tuple[str, Split, int], ...] = (
        ("train.jsonl", "train", _TRAIN_ROWS),
        ("validation.jsonl", "held_out", _VALIDATION_ROWS),
    )
    for name, split, rows in files:
        _write_lines(
            out_dir / name, [{"messages": row} for row in _question_rows(split, rows, seed)]
        )


def continuation_conversations(seed: int) -> Iterator[Messages]:
    """Yield pretraining conversations: half a training paragraph, answered by its other half."""
    chooser = random.Random(seed)
    paragraphs = [
        paragraph
        for document in documents()
        if document.split == "train"
        for entry in document.entries
        for paragraph in entry.paragraphs
        if is_prose(paragraph) and 120 <= len(paragraph) <= 900
    ]
    chooser.shuffle(paragraphs)
    for paragraph in paragraphs:
        words = paragraph.split(" ")
        half = len(words) // 2
        yield [
            {"role": "user", "content": f"Continue: {' '.join(words[:half])}"},
            {"role": "assistant", "content": " ".join(words[half:])},
        ]


def write_hellaswag(path: Path, tokenizer: Any, seed: int, items: int = 400) -> None:
    """Write multiple-choice items in hellaswag's JSON-lines format from held-out prose.

    The text has single spaces and no square brackets, because hellaswag's preprocessing removes
    bracketed text and doubled spaces. The four endings of an item have the same number of tokens
    (counted after a space) and of characters. Length therefore affects neither `acc` nor
    `acc_norm`, which divides by the number of characters.

    Args:
        path: the file to write.
        tokenizer: an object with `encode(text, add_special_tokens=False)` that never merges across
            a space, like byte-level BPE.
        seed: decides contexts, endings and labels.
        items: number of items to write.

    Raises:
        StageError: the held-out text yields fewer items.
    """
    cache: dict[str, int] = {}

    def count_tokens(word: str) -> int:
        if word not in cache:
            cache[word] = len(tokenizer.encode(f" {word}", add_special_tokens=False))
        return cache[word]

    chooser = random.Random(seed)
    prose = [
        _Prose(title, words, [count_tokens(word) for word in words])
        for title, words in _held_out_prose()
    ]
    stretches = _index_stretches(prose)
    by_document = [
        list(_items_of_document(number, prose, stretches, chooser)) for number in range(len(prose))
    ]
    # Take one item from each document in turn, so that long documents do not dominate.
    made = [item for turn in zip_longest(*by_document) for item in turn if item is not None]
    if len(made) < items:
        raise StageError(
            f"{path.name} could not be written",
            f"{items} items from the held-out documents",
            f"text for {len(made)} items",
            "ask for fewer items",
        )
    _write_lines(path, [{"ind": ind, **item} for ind, item in enumerate(made[:items])])


def _question_rows(split: Split, rows: int, seed: int) -> list[Messages]:
    chooser = random.Random(f"{seed} {split}")
    askable = [
        [entry for entry in document.entries if _can_be_asked(entry)]
        for document in documents()
        if document.split == split
    ]
    pool = [(entries, index) for entries in askable for index in range(len(entries))]
    chosen = chooser.sample(pool, min(rows, len(pool)))
    return [_row(number, entries, index) for number, (entries, index) in enumerate(chosen)]


def _row(number: int, entries: Sequence[Entry], index: int) -> Messages:
    entry = entries[index]
    if number % 15 == 7:
        return [
            {"role": "system", "content": _BRIEF_INSTRUCTION},
            {"role": "user", "content": _question(entry)},
            {"role": "assistant", "content": _first_sentence(entry)},
        ]
    messages = [
        {"role": "user", "content": _question(entry)},
        {"role": "assistant", "content": _answer(entry)},
    ]
    if number % 20 == 3:
        messages[1]["thinking"] = f"The question is about the {entry.kind} {_short_name(entry)}."
    if number % 10 == 1 and index + 1 < len(entries):
        following = entries[index + 1]
        messages += [
            {"role": "user", "content": f"And {_question(following, follow_up=True)}"},
            {"role": "assistant", "content": _answer(following)},
        ]
    return messages


def _can_be_asked(entry: Entry) -> bool:
    prose = next((paragraph for paragraph in entry.paragraphs if is_prose(paragraph)), None)
    return (
        prose is not None
        and len(prose) + len(entry.signature) <= _LONGEST_ANSWER_CHARACTERS
        and "__" not in entry.name
    )


def _question(entry: Entry, follow_up: bool = False) -> str:
    start = "what" if follow_up else "What"
    if entry.kind == "topic":
        return f"{start} does the language reference say about `{entry.name}`?"
    if entry.kind == "module":
        return f"{start} is the module `{entry.name}` for?"
    return f"{start} does `{entry.name}` do?"


def _answer(entry: Entry) -> str:
    name = _short_name(entry)
    if entry.kind in ("module", "topic"):
        place = f"`{name}` is a {entry.kind} of the Python documentation."
    else:
        place = f"`{name}` is a {entry.kind} of `{entry.name.rpartition('.')[0]}`."
        if entry.signature:
            place += f" It is written `{name}{entry.signature}`."
    return f"{place} Its documentation says: {_first_prose(entry)}"


def _first_prose(entry: Entry) -> str:
    return next(paragraph for paragraph in entry.paragraphs if is_prose(paragraph))


def _first_sentence(entry: Entry) -> str:
    sentence, stop, _ = _first_prose(entry).partition(". ")
    return f"{sentence}{stop.strip()}"


def _short_name(entry: Entry) -> str:
    return entry.name.rpartition(".")[2]


def _held_out_prose() -> list[tuple[str, list[str]]]:
    """Return (title, words) of every held-out document with more than 80 words of prose."""
    prose = []
    for document in documents():
        if document.split == "held_out":
            words = _clean_words(document)
            if len(words) > 80:
                prose.append((document.entries[0].name, words))
    return prose


def _clean_words(document: Document) -> list[str]:
    return [
        word
        for entry in document.entries
        for paragraph in entry.paragraphs
        if is_prose(paragraph) and not {"[", "]"} & set(paragraph)
        for word in paragraph.split()
    ]


def _index_stretches(prose: Sequence[_Prose]) -> _Stretches:
    """Index every sequence of whole words that could serve as an ending by its size."""
    stretches: _Stretches = defaultdict(list)
    for number, document in enumerate(prose):
        for start in range(len(document.words)):
            tokens, characters = 0, -1
            for end in range(start + 1, len(document.words) + 1):
                tokens += document.tokens[end - 1]
                characters += 1 + len(document.words[end - 1])
                if tokens > _ENDING_TOKENS[1]:
                    break
                if tokens >= _ENDING_TOKENS[0]:
                    stretches[tokens, characters].append((number, start, end))
    return stretches


def _items_of_document(
    number: int, prose: Sequence[_Prose], stretches: _Stretches, chooser: random.Random
) -> Iterator[dict[str, Any]]:
    """Yield one item for each pair of context and ending; pairs do not overlap.

    A pair is skipped if other documents have fewer than three endings of the same size.
    """
    document = prose[number]
    end = 0
    while True:
        start = end
        middle = _advance(document.tokens, start, chooser.randint(*_CONTEXT_TOKENS))
        end = _advance(document.tokens, middle, chooser.randint(*_ENDING_TOKENS))
        if end >= len(document.words):
            return
        truth = " ".join(document.words[middle:end])
        size = sum(document.tokens[middle:end]), len(truth)
        others = {
            " ".join(prose[other].words[first:last]): None
            for other, first, last in stretches[size]
            if other != number
        }
        others.pop(truth, None)
        if len(others) < 3:
            continue
        endings = chooser.sample(list(others), 3)
        label = chooser.randrange(4)
        endings.insert(label, truth)
        context = " ".join(document.words[start:middle])
        yield {
            "activity_label": document.title,
            "ctx_a": context,
            "ctx_b": "",
            "ctx": context,
            "endings": endings,
            "label": label,
            "source_id": f"stdlib~{document.title}~{start}",
            "split": "val",
            "split_type": "zeroshot",
        }


def _advance(tokens: Sequence[int], start: int, least_tokens: int) -> int:
    """Return the first index at which the words from `start` reach `least_tokens` tokens."""
    total, index = 0, start
    while total < least_tokens and index < len(tokens):
        total += tokens[index]
        index += 1
    return index


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
