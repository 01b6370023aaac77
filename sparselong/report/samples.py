"""What the models answered, side by side: items of tasks, those first whose answer has flipped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sparselong.report.elements import (
    Child,
    Markup,
    element,
    is_number,
    note,
    show_percent,
    table,
)
from sparselong.report.source import MODELS, Run

_MOST_ITEMS = 8
_MOST_CHARACTERS = 1200
_DEMO = "demo_hellaswag"
Answers = Mapping[str, Mapping[str, Any]]
"""By model, a task's row of `04_eval/<model>.json`."""


def samples(run: Run) -> list[Markup]:
    """Return a few items of each multiple-choice task with the answers of all models."""
    blocks = []
    for task in run.results.get("tasks", {}):
        answers = {model: tasks[task] for model, tasks in run.answers.items() if task in tasks}
        chosen = _choose(answers)
        if chosen:
            texts = run.items if task == _DEMO else []
            told = "Shares are each model's probabilities of the choices; ✓ is the right one, and"
            blocks.append(element("h3", task))
            blocks.append(note(f"{told} framed is what the model chose. {_flipped(answers)}"))
            blocks += [_item(number, answers, texts) for number in chosen]
    return blocks or [note("Stage 04 recorded no answers that can be shown.")]


def _choose(answers: Answers) -> list[int]:
    """Return items to show: flips of the last model, flips of others, then the first ones."""
    if "base" not in answers or not all(_is_whole(row) for row in answers.values()):
        return []
    base = answers["base"]["right"]
    numbers = range(min(len(row["right"]) for row in answers.values()))
    others = [row["right"] for name, row in answers.items() if name != "base"]
    lost = [i for i in numbers if base[i] > min((right[i] for right in others[-1:]), default=1)]
    gained = [i for i in numbers if base[i] < max((right[i] for right in others[-1:]), default=0)]
    half = _MOST_ITEMS // 2
    some = [i for i in numbers if any(right[i] != base[i] for right in others)]
    order = [*lost[:half], *gained[:half], *lost, *gained, *some, *numbers]
    return list(dict.fromkeys(order))[:_MOST_ITEMS]


def _is_whole(row: Mapping[str, Any]) -> bool:
    """Return whether an answer is recorded for each item."""
    right, choices = row.get("right"), row.get("log_likelihoods")
    return isinstance(right, list) and isinstance(choices, list) and len(right) == len(choices)


def _flipped(answers: Answers) -> str:
    base = answers["base"]["right"]
    counts = [
        f"{sum(a != b for a, b in zip(base, row['right'], strict=False)):,} of the "
        f"{len(base):,} answers of the {MODELS.get(model, model)} model are right where the base's "
        "are wrong, or the other way round."
        for model, row in list(answers.items())[-1:]
        if model != "base"
    ]
    return " ".join(counts)


def _item(number: int, answers: Answers, texts: Sequence[Mapping[str, Any]]) -> Markup:
    """Return an item as a table: its choices, and each model's share of them."""
    text = texts[number] if number < len(texts) else {}
    choices = text.get("endings", [])
    shares = {model: _shares(row["log_likelihoods"][number]) for model, row in answers.items()}
    count = max(len(each) for each in shares.values())
    rows = []
    for index in range(count):
        label = choices[index] if index < len(choices) else f"choice {index + 1}"
        mark = element("b", " ✓", title="the right answer") if text.get("label") == index else None
        cells: list[Child] = [[element("span", label, class_="said", dir="auto"), mark]]
        for share in shares.values():
            best = share.index(max(share))
            value = show_percent(share[index], 0) if index < len(share) else ""
            cells.append(element("b", value, class_="chosen") if index == best else value)
        rows.append(cells)
    verdict = ["", *("right" if row["right"][number] else "wrong" for row in answers.values())]
    head = [f"item {number + 1}", *(MODELS.get(model, model) for model in answers)]
    context = _cut(str(text["ctx"])) if "ctx" in text else "This task's texts are not in the run."
    said = element("p", context, class_="said" if text else "aside", dir="auto")
    return element("section", said, table(head, [*rows, verdict]), class_="sample")


def _shares(log_likelihoods: Sequence[float]) -> list[float]:
    """Return the probabilities of choices from their log-likelihoods."""
    finite = [value if is_number(value) else -math.inf for value in log_likelihoods]
    highest = max(finite)
    if highest == -math.inf:
        return [0.0] * len(finite)
    weights = [math.exp(value - highest) for value in finite]
    return [weight / sum(weights) for weight in weights]


def _cut(text: str) -> str:
    """Return the end of a text, which is what an answer continues."""
    more = len(text) - _MOST_CHARACTERS
    return f"({more:,} characters before) … {text[-_MOST_CHARACTERS:]}" if more > 0 else text
