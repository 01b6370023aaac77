"""What the table must show, as quotients of two rows' figures with their interval over seeds.

A quotient is taken seed by seed, because a seed draws the same calibration documents and the same
order of training rows for every row. Of a row that no seed changes, its one figure is used for all.
The interval is Student's at 95 %. A statement holds if it does in all of its interval, fails if it
does nowhere in it, and is within noise otherwise; of one seed the figure itself decides.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.compared.methods import METHODS
from benchmarks.compared.table import BASE, SETTING, Name, line

_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Quantiles for two to ten values; of more, that of ten is a little too wide."""
OURS, REFERENCE = ("ours", "native", "no"), ("sparsegpt 2:4 + gptq", "native", "no")
MAGNITUDE, RANDOM = ("magnitude 2:4 + rtn", "native", "no"), ("random 2:4 + rtn", "native", "no")
CEILING = ("base", "native", "dense")
Values = dict[Name, dict[int, dict[str, float]]]
"""Figures by row, seed and metric."""


@dataclass(frozen=True)
class Statement:
    """A quotient and its limit.

    Attributes:
        metric: a figure's name, or `rise`: that of perplexity over the base's.
        above: the row whose figure is divided.
        below: the row whose figure divides it.
        sign: on which side of the limit the quotient must be.
        limit: the limit.
    """

    metric: str
    above: Name
    below: Name
    sign: Literal["≤", "≥"]
    limit: float


STATEMENTS = (
    Statement("rise", OURS, REFERENCE, "≤", 0.8),
    Statement("rise", MAGNITUDE, OURS, "≥", 2.0),
    Statement("perplexity", RANDOM, BASE, "≥", 1.1),
    *(
        Statement(metric, ("ours", "native", masks), CEILING, "≤", 1.01)
        for masks in ("static", "dynamic", "learned")
        for metric in ("tuned perplexity", "perplexity")
    ),
    *(
        Statement(metric, ("ours", "native", "dynamic"), ("ours", "native", "static"), "≤", 1.0)
        for metric in ("tuned perplexity", "perplexity")
    ),
    *(
        Statement(metric, ("ours", "2:4", tuned), ("ours", "kept", tuned), "≤", 1.0)
        for tuned, metric in (
            *(("no", "perplexity"), ("dynamic", "perplexity")),
            ("dynamic", "tuned perplexity"),
        )
    ),
)


def show_verdicts(rows: Iterable[dict[str, Any]]) -> str:
    """Return a table in Markdown of the statements whose rows are there; empty if there are none.

    Args:
        rows: figures as `record.row` makes them.
    """
    values = _by_seed(rows)
    lines = [_show(each, quotients) for each in STATEMENTS if (quotients := _divide(values, each))]
    head = [line(("statement", "found", "seeds", "holds")), line(["---"] * 4)]
    return "\n".join([*head, *lines]) + "\n" if lines else ""


def judge(quotients: list[float], statement: Statement) -> str:
    """Return whether a statement holds: `yes`, `no`, or `within noise`."""
    mean, half = interval(quotients)
    sign = 1 if statement.sign == "≤" else -1
    if sign * (mean - statement.limit) + half <= 0:
        return "yes"
    return "no" if sign * (mean - statement.limit) - half > 0 else "within noise"


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean of values and half of its interval's width, 0 for a single value."""
    count = len(values)
    if count == 1:
        return values[0], 0.0
    quantile = _STUDENT[min(count, len(_STUDENT) + 1) - 2]
    return statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(count)


def _show(statement: Statement, quotients: list[float]) -> str:
    mean, half = interval(quotients)
    above, below = (_describe(name) for name in (statement.above, statement.below))
    claim = f"{statement.metric}: {above} {statement.sign} {statement.limit:g} × {below}"
    found = f"{mean:.4f}" + (f" ± {half:.4f}" if half else "")
    return line((claim, found, str(len(quotients)), judge(quotients, statement)))


def _describe(name: Name) -> str:
    method, experts, tuned = name
    parts = {"2:4": "experts 2:4", "kept": "fewer experts"}.get(experts, ""), tuned
    return ", ".join([f"`{method}`", *(part for part in parts if part not in ("", "no"))])


def _divide(values: Values, statement: Statement) -> list[float]:
    """Return a statement's quotients, of the seeds of which both rows are finished."""
    above, below = (
        _figures(values, name, statement.metric) for name in (statement.above, statement.below)
    )
    seeds = sorted(above.keys() & below.keys())
    return [above[seed] / below[seed] for seed in seeds if below[seed]]


def _figures(values: Values, name: Name, metric: str) -> dict[int, float]:
    """Return a row's figure by seed; `rise` is that of perplexity over the base's."""
    found = values.get(name, {})
    if found and name[2] == "no" and not METHODS[name[0]].is_drawn:
        seeds = {seed for row in values.values() for seed in row}
        found = dict.fromkeys(seeds, next(iter(found.values())))
    if metric != "rise":
        return {seed: figures[metric] for seed, figures in found.items()}
    base = _figures(values, BASE, "perplexity")
    return {
        seed: figures["perplexity"] / base[seed] - 1
        for seed, figures in found.items()
        if seed in base
    }


def _by_seed(rows: Iterable[dict[str, Any]]) -> Values:
    found: Values = {}
    for each in rows:
        case = each["case"]
        if SETTING not in case:
            name = (case["method"], case["experts"], case["tuned"])
            figures = found.setdefault(name, {}).setdefault(case["seed"], {})
            figures[each["metric"]] = each["value"]
    return found
