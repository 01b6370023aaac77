"""Stage 04's figures as curves: by position in the context, and by the length of the context."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from sparselong.report.elements import (
    Child,
    Markup,
    Series,
    beside,
    chart,
    element,
    folded,
    is_number,
    linear_axis,
    log2_axis,
    show_number,
    table,
)
from sparselong.report.source import MODELS

_COLOURS = {"base": "base", "compressed": "second", "finetuned": "third"}
_OTHERS = ("first", "fourth", "fifth", "sixth")
_WITH_LENGTH = re.compile(r"(.+)_(\d+)")


def colour_of(model: str, models: Iterable[str]) -> str:
    """Return the class of the style sheet that gives one of a run's models its colour."""
    if model in _COLOURS:
        return _COLOURS[model]
    others = [each for each in models if each not in _COLOURS]
    return _OTHERS[others.index(model) % len(_OTHERS)]


def title_of(key: str) -> str:
    """Return a key as a title; one like `kl` is an abbreviation."""
    return key.upper() if len(key) <= 3 else key.replace("_", " ").capitalize()


def have_numbers(rows: Any, *keys: str) -> bool:
    """Return whether each model's row is an object with numbers at these keys."""
    return isinstance(rows, Mapping) and all(
        isinstance(row, Mapping) and all(is_number(row.get(key)) for key in keys)
        for row in rows.values()
    )


def has_scores(rows: Any) -> bool:
    """Return whether each model has scores by name, each with a value."""
    if not isinstance(rows, Mapping):
        return False
    found = [row.get("scores") if isinstance(row, Mapping) else None for row in rows.values()]
    return all(each and isinstance(each, Mapping) for each in found) and all(
        isinstance(score, Mapping) and "value" in score for each in found for score in each.values()
    )


def by_length(tasks: Mapping[str, Any]) -> tuple[list[Markup], set[str]]:
    """Return scores of tasks that were measured at several context lengths, as `ruler_vt_4096`.

    Args:
        tasks: by name, rows of the models.

    Returns:
        Charts and a table, and the names of the tasks in them.
    """
    families: dict[str, dict[int, Mapping[str, Any]]] = {}
    for name, rows in tasks.items():
        found = _WITH_LENGTH.fullmatch(name)
        if found and has_scores(rows):
            families.setdefault(found[1], {})[int(found[2])] = rows
    families = {name: lengths for name, lengths in families.items() if len(lengths) > 1}
    if not families:
        return [], set()
    charts = [_length_chart(name, lengths) for name, lengths in families.items()]
    models = list(
        dict.fromkeys(m for lengths in families.values() for r in lengths.values() for m in r)
    )
    body: list[list[Child]] = [
        [name, f"{length:,}", *(_score_text(rows.get(model)) for model in models)]
        for name, lengths in families.items()
        for length, rows in sorted(lengths.items())
    ]
    head = ["task", "tokens", *(MODELS.get(model, model) for model in models)]
    shown = {f"{name}_{length}" for name, lengths in families.items() for length in lengths}
    return [element("h3", "Scores by context length"), beside(*charts), table(head, body)], shown


def _length_chart(name: str, lengths: Mapping[int, Mapping[str, Any]]) -> Markup:
    models = list(dict.fromkeys(model for rows in lengths.values() for model in rows))
    series = []
    for model in models:
        found = [(n, _score(rows.get(model)).get("value")) for n, rows in sorted(lengths.items())]
        points = [(float(length), value) for length, value in found if is_number(value)]
        colour = colour_of(model, models)
        series.append(Series(MODELS.get(model, model), points, colour, has_dots=True))
    values = [y for each in series for _, y in each.points]
    axes = (log2_axis(map(float, lengths)), linear_axis(values, from_zero=True))
    first = next(iter(next(iter(lengths.values())).values()))
    label = next(iter(first["scores"]))
    return chart(series, axes, ("tokens of context", label), name)


def _score(row: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return a task's first score."""
    return {} if row is None else next(iter(row["scores"].values()))


def _score_text(row: Mapping[str, Any] | None) -> str:
    score = _score(row)
    error = f" ± {show_number(score['stderr'])}" if is_number(score.get("stderr")) else ""
    return f"{show_number(score.get('value'))}{error}"


def by_position(rows: Any) -> list[Markup]:
    """Return a chart and a table of each figure that models have by position in the context.

    Args:
        rows: by model, objects with `by_position`: a list of objects with `first`, `last` and
            numbers. Anything else gives nothing.
    """
    curves = _position_rows(rows)
    keys = dict.fromkeys(key for curve in curves.values() for row in curve for key in row)
    keys = [key for key in keys if key not in ("first", "last", "tokens", "nll")]
    blocks = []
    for key in keys:
        name = key.replace("_", " ")
        series = [
            Series(
                MODELS.get(model, model),
                [(_middle(row), row[key]) for row in curve if is_number(row.get(key))],
                colour_of(model, rows),
                has_dots=True,
            )
            for model, curve in curves.items()
        ]
        series = [each for each in series if each.finite]
        if not series:
            continue
        points = [point for each in series for point in each.finite]
        ends = [row[end] for curve in curves.values() for row in curve for end in ("first", "last")]
        axes = (log2_axis(ends), linear_axis(y for _, y in points))
        label = "tokens of context before the token"
        blocks.append(chart(series, axes, (label, name), f"{title_of(key)} by position"))
        told = f"{title_of(key)} by position, as a table"
        blocks.append(folded(told, _position_table(curves, key)))
    return blocks


def _position_rows(rows: Any) -> dict[str, list[Mapping[str, Any]]]:
    """Return the models' rows by position that can be drawn."""
    if not isinstance(rows, Mapping):
        return {}
    found = {}
    for model, row in rows.items():
        points = row.get("by_position") if isinstance(row, Mapping) else None
        if isinstance(points, list) and points and all(
            isinstance(p, Mapping) and have_numbers({"": p}, "first", "last") and p["first"] > 0
            for p in points
        ):  # fmt: skip
            found[model] = points
    return found


def without_positions(value: Any) -> Any:
    """Return rows without what `by_position` draws."""
    drawn = _position_rows(value)
    return {
        name: {k: v for k, v in row.items() if k != "by_position"} if name in drawn else row
        for name, row in value.items()
    } if drawn else value  # fmt: skip


def _middle(row: Mapping[str, Any]) -> float:
    """Return the middle of a stretch of positions on a logarithmic axis."""
    return round((row["first"] * (row["last"] + 1)) ** 0.5, 1)


def _position_table(curves: Mapping[str, list[Mapping[str, Any]]], key: str) -> Markup:
    places = dict.fromkeys(
        (row["first"], row["last"]) for curve in curves.values() for row in curve
    )
    found = {m: {(row["first"], row["last"]): row for row in c} for m, c in curves.items()}
    body = []
    for place in sorted(places):
        rows = [each.get(place, {}) for each in found.values()]
        tokens = next((row["tokens"] for row in rows if "tokens" in row), None)
        figures = [show_number(row.get(key)) for row in rows]
        body.append([f"{place[0]:,}–{place[1]:,}", show_number(tokens), *figures])
    return table(["context tokens", "measured", *(MODELS.get(m, m) for m in curves)], body)
