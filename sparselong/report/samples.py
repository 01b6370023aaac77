"""What the models answered, side by side: first the items whose answer became wrong or right."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sparselong.report.elements import (
    Child,
    Markup,
    beside,
    element,
    is_number,
    note,
    show,
    show_percent,
    table,
)
from sparselong.report.source import MODELS, Run

_MOST_ITEMS = 8
_MOST_CHARACTERS = 1200
_EFFORT = "medium"
"""Reasoning effort of the chats that are shown, if there are any."""
Rows = Mapping[str, Mapping[str, Any]]
"""By model, a task's row of `04_eval/<model>.json`."""
Scores = Mapping[str, Sequence[float]]
"""By model, how good the answer to each item was; 1 or 0 if it was right or wrong."""


def samples(run: Run) -> list[Markup]:
    """Return chats and a few items of each task with the answers of all models."""
    blocks = _chats(run)
    for task in run.results.get("tasks", {}):
        rows = {model: tasks[task] for model, tasks in run.answers.items() if task in tasks}
        items = run.items.get(task, [])
        if scores := _per_item(
            rows, "log_likelihoods", {m: r.get("right") for m, r in rows.items()}
        ):
            told = (
                "Shares are each model's probabilities of the choices. ✓ is the right one; framed "
            )
            blocks += [element("h3", task), note(f"{told}is what the model chose.", _flips(scores))]
            blocks += [_choices(number, rows, scores, items) for number in _choose(scores)]
        elif scores := _per_item(rows, "answers", {m: _first_score(r) for m, r in rows.items()}):
            blocks += [element("h3", task), note(_flips(scores))]
            blocks += [_generated(number, rows, scores, items) for number in _choose(scores)]
    return blocks or [note("Stage 04 recorded no answers that can be shown.")]


def _chats(run: Run) -> list[Markup]:
    """Return the fixed questions with what each model said; nothing if that was not recorded."""
    efforts = run.chats.get("base", {})
    effort = _EFFORT if _EFFORT in efforts else next(iter(efforts), "")
    rows = {model: chats[effort] for model, chats in run.chats.items() if effort in chats}
    said = {model: row["said"] for model, row in rows.items() if "said" in row}
    if not said:
        return []
    told = f"With {effort} reasoning effort; the others are in 04_eval/MODEL.json, under health."
    blocks = [element("h3", "Answers in a chat"), note(told)]
    for number, chat in enumerate(next(iter(said.values()))[:_MOST_ITEMS]):
        answers = [
            [
                element("h4", MODELS.get(model, model)),
                *(_message(*message) for message in chats[number]["messages"]),
            ]
            for model, chats in said.items()
        ]
        question = element("p", chat["question"], class_="said", dir="auto")
        blocks.append(element("section", question, beside(*answers), class_="sample"))
    return blocks


def _message(channel: str, text: str) -> Markup:
    """Return a message of an answer; reasoning and calls with the name of their channel."""
    name = "" if channel == "final" else f"{channel}: "
    return element("div", element("i", name), _cut(text), class_="said", dir="auto")


def _first_score(row: Mapping[str, Any]) -> list[float] | None:
    """Return a task's first score that has a value for each item."""
    scores = row.get("scores")
    found = [s.get("by_item") for s in scores.values()] if isinstance(scores, Mapping) else []
    return next((each for each in found if isinstance(each, list)), None)


def _per_item(rows: Rows, answers: str, scores: Mapping[str, Any]) -> Scores:
    """Return the scores if every model has an answer and a score for each item; else nothing."""
    lists = [[row.get(answers), scores[model]] for model, row in rows.items()]
    if "base" not in rows or not all(isinstance(e, list) for pair in lists for e in pair):
        return {}
    if len({len(each) for pair in lists for each in pair}) != 1:
        return {}
    return scores


def _choose(scores: Scores) -> list[int]:
    """Return items to show: flips of the last model, flips of others, then the first ones."""
    base, *others = scores.values()
    last = others[-1] if others else base
    numbers = range(len(base))
    lost = [i for i in numbers if last[i] < base[i]]
    gained = [i for i in numbers if last[i] > base[i]]
    some = [i for i in numbers if any(other[i] != base[i] for other in others)]
    half = _MOST_ITEMS // 2
    order = [*lost[:half], *gained[:half], *lost, *gained, *some, *numbers]
    return list(dict.fromkeys(order))[:_MOST_ITEMS]


def _flips(scores: Scores) -> str:
    """Return how many of the last model's answers are better and worse than the base's."""
    (_, base), *_, (name, last) = scores.items()
    better = sum(mine > theirs for mine, theirs in zip(last, base, strict=True))
    worse = sum(mine < theirs for mine, theirs in zip(last, base, strict=True))
    model = MODELS.get(name, name)
    return f" Of {len(base):,} items, the {model} model gained {better:,} and lost {worse:,}."


def _choices(number: int, rows: Rows, scores: Scores, items: Sequence[Mapping[str, Any]]) -> Markup:
    """Return an item as a table: its choices, and each model's share of them."""
    item = items[number] if number < len(items) else {}
    texts = item.get("endings", [])
    shares = {model: _shares(row["log_likelihoods"][number]) for model, row in rows.items()}
    body = []
    for index in range(max(len(share) for share in shares.values())):
        text = texts[index] if index < len(texts) else f"choice {index + 1}"
        mark = element("b", " ✓", title="the right answer") if item.get("label") == index else None
        cells: list[Child] = [[element("span", text, class_="said", dir="auto"), mark]]
        for share in shares.values():
            value = show_percent(share[index], 0) if index < len(share) else ""
            is_best = share.index(max(share)) == index
            cells.append(element("b", value, class_="chosen") if is_best else value)
        body.append(cells)
    verdict = ["", *("right" if scores[model][number] else "wrong" for model in rows)]
    head = [f"item {number + 1}", *(MODELS.get(model, model) for model in rows)]
    return element("section", _asked(item), table(head, [*body, verdict]), class_="sample")


def _generated(
    number: int, rows: Rows, scores: Scores, items: Sequence[Mapping[str, Any]]
) -> Markup:
    """Return an item with the answer that each model generated."""
    item = items[number] if number < len(items) else {}
    wanted = item.get("answers")
    answers = [
        [
            element("h4", f"{MODELS.get(m, m)}, score {scores[m][number]:.3g}"),
            element("div", _cut(str(row["answers"][number])), class_="said", dir="auto"),
        ]
        for m, row in rows.items()
    ]
    told = None if wanted is None else note("Wanted: ", element("bdi", show(wanted)))
    name = element("h4", f"item {number + 1}")
    return element("section", name, _asked(item), told, beside(*answers), class_="sample")


def _asked(item: Mapping[str, Any]) -> Markup:
    """Return the text that an answer continues."""
    text = item.get("ctx", item.get("prompt"))
    if text is None:
        return element("p", "This task's texts are not in the run.", class_="aside")
    return element("p", _cut(str(text), from_end=True), class_="said", dir="auto")


def _shares(log_likelihoods: Sequence[float]) -> list[float]:
    """Return the probabilities of choices from their log-likelihoods."""
    finite = [value if is_number(value) else -math.inf for value in log_likelihoods]
    highest = max(finite)
    if highest == -math.inf:
        return [0.0] * len(finite)
    weights = [math.exp(value - highest) for value in finite]
    return [weight / sum(weights) for weight in weights]


def _cut(text: str, *, from_end: bool = False) -> str:
    """Return a text that is not too long: its beginning, or its end."""
    more = len(text) - _MOST_CHARACTERS
    if more <= 0:
        return text
    if from_end:
        return f"({more:,} characters before) … {text[-_MOST_CHARACTERS:]}"
    return f"{text[:_MOST_CHARACTERS]} … ({more:,} more characters)"
