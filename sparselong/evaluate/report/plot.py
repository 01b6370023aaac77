"""The report's plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparselong.evaluate.report.ruler import split_ruler

_COLOURS = {"base": "#4c72b0", "compressed": "#dd8452", "finetuned": "#55a868"}
_OTHERS = ("#8172b3", "#937860", "#da8bc3", "#8c8c8c", "#ccb974", "#64b5cd")
_MOST_TICKS = 8


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw accuracies, RULER's scores, perplexity and divergence by position, as a PNG.

    What was not measured has no panel. Bars and points have standard errors.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(results["perplexity"])
    drawn, others = split_ruler(results["tasks"])
    bars = {task: rows for task, rows in others.items() if _list_bars(rows)}
    compared = {name: row for name, row in results["divergence"].items() if row and "all" in row}
    panels = [_draw_bars] * bool(bars) + [_draw_ruler] * bool(drawn) + [_draw_perplexity]
    panels += [_draw_divergence] * bool(compared)
    only = {"divergence": compared}
    figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, axis in zip(panels, axes, strict=True):
        panel(axis, _colours(names), {**results, "bars": bars, "ruler": drawn, **only})
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(names))
    FigureCanvasAgg(figure).print_png(path)


def _list_bars(rows: dict[str, Any]) -> list[tuple[str, list[tuple[float, float]]]]:
    """Return a task's metrics between 0 and 1, with value and standard error of each model."""
    models = rows.values()
    found = [
        (metric, [(row[metric], row[f"{metric}_stderr"]) for row in models])
        for metric in ("acc", "acc_norm")
        if metric in rows["base"]
    ]
    for label, score in rows["base"]["scores"].items():
        own = [row["scores"][label] for row in models]
        values = [each["value"] for each in own]
        if score["to_base"] is not None and all(value is not None for value in values):
            if all(0 <= value <= 1 for value in values):
                found.append((label, [(each["value"], each["stderr"] or 0.0) for each in own]))
    return found


def _draw_bars(axis: Any, colours: dict[str, str], results: dict[str, Any]) -> None:
    groups = [
        (task, rows, metric, values)
        for task, rows in results["bars"].items()
        for metric, values in _list_bars(rows)
    ]
    width = 0.78 / len(colours)
    for offset, (name, colour) in enumerate(colours.items()):
        shift = (offset - (len(colours) - 1) / 2) * width
        heights, errors = zip(*(values[offset] for *_, values in groups), strict=True)
        places = [group + shift for group in range(len(groups))]
        axis.bar(places, heights, 0.9 * width, yerr=errors, capsize=3, label=name, color=colour)
    for group, (_, rows, *_) in enumerate(groups):
        if "chance" in rows["base"]:
            chance = rows["base"]["chance"]
            axis.hlines(chance, group - 0.45, group + 0.45, color="grey", linestyles="dotted")
    axis.set_xticks(range(len(groups)), [f"{task}\n{metric}" for task, _, metric, _ in groups])
    axis.set(ylabel="score (error bars: ± 1 stderr, dotted: chance)")


def _draw_ruler(axis: Any, colours: dict[str, str], results: dict[str, Any]) -> None:
    lengths = sorted({length for _, length in results["ruler"]})
    for name, colour in colours.items():
        means, errors = [], []
        for length in lengths:
            own = [
                rows[name]["scores"]["score"]
                for (_, n), rows in results["ruler"].items()
                if n == length
            ]
            means.append(sum(score["value"] for score in own) / len(own))
            errors.append(math.sqrt(sum(score["stderr"] ** 2 for score in own)) / len(own))
        axis.errorbar(lengths, means, errors, marker="o", capsize=3, label=name, color=colour)
    _scale_tokens(axis, lengths)
    axis.set(
        xlabel="context in tokens", ylabel="RULER, mean score of the tasks", ylim=(-0.03, 1.03)
    )


def _draw_perplexity(axis: Any, colours: dict[str, str], results: dict[str, Any]) -> None:
    every = []
    for name, colour in colours.items():
        points = results["perplexity"][name]["by_position"]
        middles = [(point["first"] * (point["last"] + 1)) ** 0.5 for point in points]
        heights = [point["perplexity"] for point in points]
        axis.plot(middles, heights, marker="o", label=name, color=colour)
        every += middles
    _scale_tokens(axis, every)
    axis.set(xlabel="tokens of context before the token", ylabel="perplexity, supervised tokens")


def _draw_divergence(axis: Any, colours: dict[str, str], results: dict[str, Any]) -> None:
    every = []
    for name, row in results["divergence"].items():
        middles = [(each["first"] * (each["last"] + 1)) ** 0.5 for each in row["by_position"]]
        heights = [each["kl"] for each in row["by_position"]]
        axis.plot(middles, heights, marker="o", label=name, color=colours[name])
        every += middles
    _scale_tokens(axis, every)
    axis.set(xlabel="tokens of context before the token", ylabel="divergence from the base (nats)")
    most = max(each["kl"] for row in results["divergence"].values() for each in row["by_position"])
    axis.set_ylim(0, 1.08 * most or 1)


def _scale_tokens(axis: Any, places: Sequence[float]) -> None:
    """Scale the axis of tokens by powers of two, with at least two ticks that are labelled."""
    first = math.floor(math.log2(min(places)))
    last = max(math.ceil(math.log2(max(places))), first + 1)
    step = -(-(last - first + 1) // _MOST_TICKS)
    powers = range(first, last + step, step)
    axis.set_xscale("log", base=2)
    axis.set_xticks([2**power for power in powers], [_label(2**power) for power in powers])
    axis.minorticks_off()
    axis.set_xlim(2 ** (first - 0.2), 2 ** (powers[-1] + 0.2))


def _label(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens >= 1024 else str(tokens)


def _colours(names: list[str]) -> dict[str, str]:
    """Return each model's colour, the same in all panels."""
    others = [name for name in names if name not in _COLOURS]
    return {
        name: _COLOURS.get(name) or _OTHERS[others.index(name) % len(_OTHERS)] for name in names
    }
