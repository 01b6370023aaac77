"""Items of RULER's tasks that fill a context of a given length.

Hsieh et al., RULER: What's the Real Context Size of Your Long-Context Language Models? (2024,
https://arxiv.org/abs/2404.06654; https://github.com/NVIDIA/RULER, Apache-2.0). Wording, sizes and
scoring are the published ones, and the names those of lm-eval. What differs, and why:

- Every item is drawn by a seed of its own, so that it does not depend on how many others there are.
- Prompt and answer together never exceed the length. All items of a task have the size with which
  the first one just fits; those that do not fit are made a little smaller.
- A misspelling in the question about variables is corrected.
- The solved example of common words is shown, as published; lm-eval leaves it out.
- The prompt is plain text that ends where the answer begins, without a chat template.

Left out: the tasks whose text comes from the network (`LEFT_OUT`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, NoReturn

from sparselong.config import Config
from sparselong.data.ruler import chains, frequencies, needles
from sparselong.data.ruler.draft import Draft
from sparselong.errors import StageError


class _Task(NamedTuple):
    """How a task's items are made.

    Attributes:
        draw: (random numbers, size, length in tokens) → draft; a larger size gives a longer text.
        answer_tokens: the most tokens that an answer may have.
        smallest: the smallest size that makes sense.
    """

    draw: Callable[[random.Random, int, int], Draft]
    answer_tokens: int
    smallest: int


_TASKS = {
    "niah_single_1": _Task(needles.draw_single, 128, 1),
    "niah_multikey_2": _Task(needles.draw_numbers, 128, 1),
    "niah_multikey_3": _Task(needles.draw_ids, 128, 1),
    "ruler_vt": _Task(chains.draw, 30, chains.HOPS + 1),
    "ruler_cwe": _Task(frequencies.draw_common, 120, frequencies.COMMON + 1),
    "ruler_fwe": _Task(frequencies.draw_coded, 50, 100),
}
LEFT_OUT = {
    **dict.fromkeys(
        ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery"),
        "its essays come from the network",
    ),
    **dict.fromkeys(
        ("ruler_qa_squad", "ruler_qa_hotpot"), "its questions and articles come from the network"
    ),
    "ruler": "a group, seven tasks of which need the network",
    "longcxt": "a tag of tasks, some of which need the network",
}
"""lm-eval's other names for RULER's tasks, and why they are not supported."""


def answer_tokens(task: str) -> int:
    """Return the most tokens that an answer to a task may have."""
    return _TASKS[task].answer_tokens


def make_items(
    task: str, length: int, count: int, seed: int, tokenizer: Any
) -> list[dict[str, Any]]:
    """Return items that fill a context.

    Args:
        task: one of `config.RULER_TASKS`.
        length: most tokens of a prompt and its answer.
        count: number of items.
        seed: the same seed gives the same items.
        tokenizer: a transformers tokenizer, by which texts are measured.

    Returns:
        {prompt, answers (all of which are wanted), tokens (of the prompt)} of each item.

    Raises:
        StageError: the smallest item is longer than that.
    """
    kind = _TASKS[task]
    room = length - kind.answer_tokens
    make = partial(_make, task, length, seed, tokenizer)
    size, items = _find_size(make, kind.smallest, room), []
    for index in range(count):
        own = size
        while (item := make(index, own))["tokens"] > room:
            if own == kind.smallest:
                _refuse(task, length, item["tokens"])
            own = max(kind.smallest, own - max(1, own // 100))
        items.append(item)
    return items


def check_ruler(config: Config, tokenizer: Any) -> None:
    """Raise if a context of `evaluation.ruler.lengths` is too short for one of the tasks.

    Args:
        config: names tasks and lengths.
        tokenizer: the base's.

    Raises:
        StageError: a task's smallest item is longer than that.
    """
    for task in config.evaluation.ruler_tasks:
        kind = _TASKS[task]
        for length in config.evaluation.ruler.lengths:
            tokens = _make(task, length, config.seed, tokenizer, 0, kind.smallest)["tokens"]
            if tokens + kind.answer_tokens > length:
                _refuse(task, length, tokens)


def _make(
    task: str, length: int, seed: int, tokenizer: Any, index: int, size: int
) -> dict[str, Any]:
    source = random.Random(f"{seed}/{task}/{length}/{index}")
    draft = _TASKS[task].draw(source, size, length)
    tokens = len(tokenizer(draft.prompt, add_special_tokens=False)["input_ids"])
    return {"prompt": draft.prompt, "answers": draft.answers, "tokens": tokens}


def _refuse(task: str, length: int, tokens: int) -> NoReturn:
    least = tokens + _TASKS[task].answer_tokens
    raise StageError(
        f"{task} cannot be made for a context of {length:,} tokens",
        f"at least {least:,} tokens for its smallest item and the answer",
        f"evaluation.ruler.lengths with {length:,}",
        f"remove {length:,} from evaluation.ruler.lengths, or {task} from evaluation.tasks",
    )


def _find_size(make: Callable[[int, int], dict[str, Any]], smallest: int, room: int) -> int:
    """Return about the largest size with which the first item fits, or the smallest."""
    fits, exceeds = smallest, 2 * smallest
    while make(0, exceeds)["tokens"] <= room:
        fits, exceeds = exceeds, 2 * exceeds
    while exceeds - fits > max(1, fits // 200):
        middle = (fits + exceeds) // 2
        if make(0, middle)["tokens"] <= room:
            fits = middle
        else:
            exceeds = middle
    return fits


def score_answer(answer: str, wanted: list[str]) -> float:
    """Return the fraction of the wanted texts that an answer contains, in upper or lower case."""
    return sum(text.lower() in answer.lower() for text in wanted) / len(wanted)
