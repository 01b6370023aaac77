"""Conversations in harmony and solved retrieval tasks, as tokens to train on.

Two kinds of conversation teach the format and its special tokens: continuing a paragraph, and
translating a message into another language. The retrieval tasks are RULER's, made by the generators
that stage 04 uses and asked in its form: plain text, without a chat template. In a context with
many needles several are asked for, one after another, because one question about a thousand tokens
is little to learn from.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.proxy import text
from benchmarks.proxy.readers import read_pairs
from sparselong.data import make_items
from sparselong.data.corpus import is_prose

_LONG = {2048: 200, 4096: 70}
EXAMPLES = {
    "niah_single_1": {512: 1500, 1024: 1500, **_LONG},
    "niah_multikey_2": {384: 1500, 512: 1500, 1024: 2000, 2048: 200},
    "niah_multikey_3": {512: 2500, 1024: 2500, 2048: 200},
    "ruler_vt": {1024: 2500, **_LONG},
    "ruler_cwe": {1024: 2500, **_LONG},
    "ruler_fwe": {512: 1000, 1024: 1500, **_LONG},
}
"""Solved examples of each task by length in tokens: as short as it allows, 1K, and some longer."""
_MORE_QUESTIONS = 6
_PAIRS_PER_LANGUAGE = 400
_NEEDLE = re.compile(r"One of the special magic (\w+)s for (.+?) is: (\S+)\.")
_QUESTION = (
    "\nWhat is the special magic {0} for {1} mentioned in the provided text? The special magic {0} "
    "for {1} mentioned in the provided text is"
)


class Example(NamedTuple):
    """A solved task: its tokens, and whether each belongs to an answer."""

    tokens: list[int]
    answered: list[bool]


def write_continuations(documents: list[text.Document], count: int, seed: int) -> list[Any]:
    """Return conversations in which half a paragraph is answered by its other half."""
    source = random.Random(f"{seed}/continuations")
    paragraphs = [
        paragraph
        for document in documents
        if document.kind in ("manual", "reference", "docs") and not document.held_out
        for paragraph in text.list_paragraphs(document.text)
        if 160 <= len(paragraph) <= 1200 and is_prose(paragraph)
    ]
    found = []
    for paragraph in source.sample(paragraphs, min(count, len(paragraphs))):
        words = paragraph.split(" ")
        half = len(words) // 2
        found.append(_exchange(f"Continue: {' '.join(words[:half])}", " ".join(words[half:])))
    return found


def write_translations(documents: list[text.Document], count: int, seed: int) -> list[Any]:
    """Return conversations in which a message is translated; none of it is in held-out text."""
    held_out = {
        paragraph
        for document in documents
        if document.held_out
        for paragraph in text.list_paragraphs(document.text)
    }
    source, found = random.Random(f"{seed}/translations"), []
    for each in (source for source in text.SOURCES if source.kind == "messages"):
        for path, language in text.list_files(each):
            if language in text.LANGUAGES:
                pairs = read_pairs(path)
                for english, other in source.sample(pairs, min(len(pairs), _PAIRS_PER_LANGUAGE)):
                    if len(other) <= 800 and " ".join(other.split()) not in held_out:
                        request = f"Translate to {text.LANGUAGES[language]}: {english}"
                        found.append(_exchange(request, other))
    return source.sample(found, min(count, len(found)))


def _exchange(request: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]


def make_examples(
    tokenizer: Any, counts: dict[str, dict[int, int]], most_tokens: int, seed: str
) -> Iterator[Example]:
    """Yield solved examples of every task, each ending in the end of a text.

    Args:
        tokenizer: the model's.
        counts: examples by task and length in tokens.
        most_tokens: longer ones are left out.
        seed: decides the examples.
    """
    for task, lengths in counts.items():
        for length, count in lengths.items():
            own = _number_of(seed, task, length)
            for number, item in enumerate(make_items(task, length, count, own, tokenizer)):
                source = random.Random(f"{seed}/{task}/{length}/{number}")
                example = _encode(_solve(task, item, source), tokenizer)
                if len(example.tokens) <= most_tokens:
                    yield example


def _number_of(*parts: Any) -> int:
    """Return a seed that stage 04's seeds, which are small, do not equal."""
    return random.Random("/".join(map(str, parts))).getrandbits(60) + (1 << 60)


def _solve(task: str, item: dict[str, Any], source: random.Random) -> list[tuple[str, str]]:
    """Return (text, answer) of each question of an item, the one that is scored first."""
    prompt, answers = item["prompt"], item["answers"]
    if task == "ruler_vt":
        return [(prompt, " " + " ".join(answers))]
    if task == "ruler_cwe":
        return [(prompt, "".join(f" {i}. {word}" for i, word in enumerate(answers, 1)))]
    if task == "ruler_fwe":
        return [(prompt, f" {', '.join(answers)}.")]
    asked = [(prompt, f" {answers[0]}.")]
    needles = [found for found in _NEEDLE.findall(prompt) if found[2] != answers[0]]
    for kind, key, value in source.sample(needles, min(_MORE_QUESTIONS, len(needles))):
        asked.append((_QUESTION.format(kind, key), f" {value}."))
    return asked


def _encode(parts: list[tuple[str, str]], tokenizer: Any) -> Example:
    tokens: list[int] = []
    answered: list[bool] = []
    texts = [each for pair in parts for each in pair]
    for number, ids in enumerate(tokenizer(texts, add_special_tokens=False)["input_ids"]):
        tokens += ids
        answered += [number % 2 == 1] * len(ids)
    return Example([*tokens, tokenizer.pad_token_id], [*answered, True])
