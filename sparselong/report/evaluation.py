"""Stage 04: tasks, perplexity by position, and whatever else its results hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparselong.report.elements import (
    MISSING,
    Child,
    Interval,
    Markup,
    Series,
    beside,
    chart,
    element,
    folded,
    intervals,
    is_number,
    linear_axis,
    log2_axis,
    note,
    pairs,
    show,
    show_anything,
    show_change,
    show_number,
    show_percent,
    table,
)
from sparselong.report.source import MODELS, Run

_COLOURS = {"base": "base", "compressed": "second", "finetuned": "third"}
_SHOWN_ELSEWHERE = ("settings", "warnings", "tasks", "perplexity", "examples")
_METRICS = ("acc", "acc_norm")


def evaluation(run: Run) -> list[Markup]:
    """Return stage 04's results: what is known in its own form, the rest as it is."""
    results = run.results
    blocks = [note(warning, kind="warning") for warning in results.get("warnings", [])]
    blocks.append(
        note(
            "All models were measured in the same way. Differences are to the base, on the same "
            "items and tokens; ± is one standard error. Published figures use other settings."
        )
    )
    for task, rows in results.get("tasks", {}).items():
        blocks += [element("h3", task), *_task(task, rows)]
    if "perplexity" in results:
        blocks += [element("h3", "Perplexity on held-out conversations")]
        blocks += _perplexity(results["perplexity"], results.get("settings", {}))
    for key, value in results.items():
        if key not in _SHOWN_ELSEWHERE:
            blocks += [element("h3", _title(key))]
            blocks += [*by_position(value), *show_anything(_without_positions(value))]
    settings = {key: show(value, key) for key, value in results.get("settings", {}).items()}
    return [*blocks, folded("Settings", pairs(settings))]


def _title(key: str) -> str:
    """Return a key as a title; one like `kl` is an abbreviation."""
    return key.upper() if len(key) <= 3 else key.replace("_", " ").capitalize()


def _has(rows: Any, *keys: str) -> bool:
    """Return whether each model's row is an object with numbers at these keys."""
    return isinstance(rows, Mapping) and all(
        isinstance(row, Mapping) and all(is_number(row.get(key)) for key in keys)
        for row in rows.values()
    )


def _task(task: str, rows: Mapping[str, Any]) -> list[Markup]:
    """Return a task's accuracies with their errors, differences and flips."""
    metrics = [key for key in _METRICS if _has(rows, key, f"{key}_stderr")]
    blocks = [beside(*(_accuracies(rows, metric) for metric in metrics))] if metrics else []
    blocks += [_flips(rows, metric) for metric in metrics]
    known = {f"{metric}{end}" for metric in _METRICS for end in ("", "_stderr", "_to_base")}
    rest = {}
    for name, row in rows.items() if blocks else ():
        left = {k: v for k, v in row.items() if k not in known | {"requests_sha256"}}
        rest[MODELS.get(name, name)] = left
    if not blocks:
        return [*by_position(rows), *show_anything(_without_positions(rows))]
    return [*blocks, folded("Other figures", show_anything(rest))]


def _accuracies(rows: Mapping[str, Any], metric: str) -> Markup:
    """Return each model's accuracy with its standard error, and chance."""
    drawn = [
        Interval(
            MODELS.get(name, name),
            row[metric],
            row[f"{metric}_stderr"],
            f"{show_percent(row[metric])} ± {show_percent(row[f'{metric}_stderr'])}",
            _COLOURS.get(name, "first"),
        )
        for name, row in rows.items()
    ]
    first = next(iter(rows.values()))
    chance = first.get("chance") if is_number(first.get("chance")) else None
    ends = [row.value + sign * row.stderr for row in drawn for sign in (-1, 1)]
    axis = linear_axis([100 * end for end in [*ends, *([chance] if chance is not None else [])]])
    percent = [
        Interval(row.name, 100 * row.value, 100 * row.stderr, row.text, row.colour) for row in drawn
    ]
    items = f", {first['items']:,} items" if is_number(first.get("items")) else ""
    told = f"chance, {show_percent(chance)}" if chance is not None else ""
    title = f"{metric} in percent{items}{f'; dotted: {told}' if told else ''}"
    line = None if chance is None else 100 * chance
    return intervals(percent, axis, title, line=line, line_text=told)


def _flips(rows: Mapping[str, Any], metric: str) -> Markup:
    """Return each model's difference to the base, with the items that flipped."""
    body = []
    for name, row in rows.items():
        pair = row.get(f"{metric}_to_base", {})
        cells: list[Child] = [MODELS.get(name, name), show_percent(row[metric], 2)]
        if name == "base" or not pair:
            body.append([*cells, *[MISSING] * 4])
            continue
        cells.append(f"{show_change(100 * pair['difference'], 100 * pair['stderr'])} points")
        body.append([*cells, f"+{pair['gained']}", f"−{pair['lost']}", show_number(pair["p"])])
    head = ["model", metric, "to base", "became right", "became wrong", "McNemar's p"]
    return table(head, body)


def _perplexity(rows: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Markup]:
    """Return each model's perplexity, overall and by position in the context."""
    if not all(isinstance(r, Mapping) and _has({"": r.get("supervised")}, "perplexity")
               for r in rows.values()):  # fmt: skip
        return show_anything(rows)
    body = []
    for name, row in rows.items():
        pair = row.get("to_base") if name != "base" else None
        change: list[Child] = [MISSING, MISSING]
        if pair:
            change = [f"× {pair['ratio']:.4f}", show_change(pair["difference"], pair["stderr"], 4)]
        everything = row.get("all", {}).get("perplexity")
        figures = [show_number(row["supervised"]["perplexity"]), *change, show_number(everything)]
        body.append([MODELS.get(name, name), *figures])
    first = next(iter(rows.values()))
    told = f"{first['supervised'].get('tokens', 0):,} supervised tokens"
    if is_number(settings.get("conversations")):
        told += f" in {settings['conversations']:,} conversations"
    head = ["model", "supervised tokens", "ratio to base", "nats per token", "all tokens"]
    return [note(f"{told}."), table(head, body), *by_position(rows)]


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
                _COLOURS.get(model, "first"),
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
        blocks.append(chart(series, axes, (label, name), f"{_title(key)} by position"))
        told = f"{_title(key)} by position, as a table"
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
            isinstance(p, Mapping) and _has({"": p}, "first", "last") and p["first"] > 0
            for p in points
        ):  # fmt: skip
            found[model] = points
    return found


def _without_positions(value: Any) -> Any:
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
