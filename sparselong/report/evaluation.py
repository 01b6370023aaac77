"""Stage 04: tasks, perplexity by position, and whatever else its results hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparselong.report.curves import (
    by_length,
    by_position,
    colour_of,
    has_scores,
    have_numbers,
    title_of,
    without_positions,
)
from sparselong.report.elements import (
    MISSING,
    Child,
    Interval,
    Markup,
    beside,
    element,
    folded,
    intervals,
    is_number,
    linear_axis,
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

_SHOWN_ELSEWHERE = ("settings", "warnings", "tasks", "perplexity", "files")
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
    charts, drawn = by_length(results.get("tasks", {}))
    blocks += charts
    for task, rows in results.get("tasks", {}).items():
        if task in drawn:
            continue
        blocks += [element("h3", task), *_task(rows)]
    if "perplexity" in results:
        blocks += [element("h3", "Perplexity on held-out conversations")]
        blocks += _perplexity(results["perplexity"], results.get("settings", {}))
    for key, value in results.items():
        if key not in _SHOWN_ELSEWHERE:
            blocks += [element("h3", title_of(key))]
            blocks += [*by_position(value), *show_anything(without_positions(value))]
    settings = {key: show(value, key) for key, value in results.get("settings", {}).items()}
    return [*blocks, folded("Settings", pairs(settings))]


def _task(rows: Any) -> list[Markup]:
    """Return a task's accuracies and scores with their errors, differences and flips."""
    metrics = [key for key in _METRICS if have_numbers(rows, key, f"{key}_stderr")]
    blocks = [beside(*(_accuracies(rows, metric) for metric in metrics))] if metrics else []
    blocks += [_flips(rows, metric) for metric in metrics]
    if has_scores(rows):
        blocks.append(_scores(rows))
    known = {f"{metric}{end}" for metric in _METRICS for end in ("", "_stderr", "_to_base")}
    rest = {}
    for name, row in rows.items() if blocks else ():
        hidden = known | {"requests_sha256", *(["scores"] if has_scores(rows) else [])}
        left = {k: v for k, v in row.items() if k not in hidden}
        rest[MODELS.get(name, name)] = left
    if not blocks:
        return [*by_position(rows), *show_anything(without_positions(rows))]
    return [*blocks, folded("Other figures", show_anything(rest))]


def _scores(rows: Mapping[str, Any]) -> Markup:
    """Return each model's scores with their errors and differences to the base."""
    labels = list(dict.fromkeys(label for row in rows.values() for label in row["scores"]))
    body = []
    for name, row in rows.items():
        cells: list[Child] = [MODELS.get(name, name)]
        for label in labels:
            score = row["scores"].get(label, {})
            stderr, pair = score.get("stderr"), score.get("to_base")
            error = f" ± {show_number(stderr)}" if is_number(stderr) else ""
            cells.append(f"{show_number(score.get('value'))}{error}")
            is_other = name != "base" and isinstance(pair, Mapping)
            cells.append(
                f"{show_change(pair['difference'], pair['stderr'], 4)}, "
                f"+{pair['gained']} / −{pair['lost']}"
                if is_other and have_numbers({"": pair}, "difference", "stderr")
                else MISSING
            )
        body.append(cells)
    head = [
        "model",
        *(part for label in labels for part in (label, "to base, became better / worse")),
    ]
    return table(head, body)


def _accuracies(rows: Mapping[str, Any], metric: str) -> Markup:
    """Return each model's accuracy with its standard error, and chance."""
    drawn = [
        Interval(
            MODELS.get(name, name),
            row[metric],
            row[f"{metric}_stderr"],
            f"{show_percent(row[metric])} ± {show_percent(row[f'{metric}_stderr'])}",
            colour_of(name, rows),
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
    if not all(isinstance(r, Mapping) and have_numbers({"": r.get("supervised")}, "perplexity")
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
