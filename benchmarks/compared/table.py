"""The rows of the table, finished now or by an earlier run, and how they are shown."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.compared.measuring import Figures
from benchmarks.record import row

BACKEND, SETTING = "sparselong", "setting"
COLUMNS = {
    "perplexity": (1, ".3f"),
    "kl": (1, ".5f"),
    "top-1 agreement": (1, ".4f"),
    "accuracy": (1, ".4f"),
    "tuned perplexity": (1, ".3f"),
    "tuned kl": (1, ".5f"),
    "2:4 groups": (1, ".3f"),
    "bytes": (1e6, ".2f"),
    "seconds": (1, ".1f"),
}
"""Metrics that are shown, in which unit and with how many digits; bytes in MB."""
BASE = ("base", "native", "no")
Name = tuple[str, str, str]
"""Method, experts, and how the model was fine-tuned."""
Case = dict[str, str | int]


@dataclass
class Table:
    """The figures of finished rows.

    Attributes:
        settings: numbers that all rows depend on, by name.
        rows: figures of finished rows, as `record.row` makes them.
    """

    settings: dict[str, float]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._done = {_key(each["case"]) for each in self.rows}
        if not self.rows:
            for name, value in self.settings.items():
                self.rows.append(row({SETTING: name}, BACKEND, "value", value, "1"))

    def has(self, case: Case) -> bool:
        """Return whether a row is finished."""
        return _key(case) in self._done

    def add(self, case: Case, figures: Figures) -> None:
        """Add a finished row."""
        for metric, (value, unit) in figures.items():
            self.rows.append(row(case, BACKEND, metric, value, unit))
        self._done.add(_key(case))


def read_earlier(path: Path, settings: dict[str, float]) -> list[dict[str, Any]]:
    """Return the rows of an earlier file.

    Raises:
        ValueError: they were measured with other settings.
    """
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    found = {each["case"][SETTING]: each["value"] for each in rows if SETTING in each["case"]}
    other = sorted(name for name in found | settings if found.get(name) != settings.get(name))
    if other:
        raise ValueError(
            f"{path} was measured with other settings: "
            + ", ".join(f"{each} {found.get(each)}, now {settings.get(each)}" for each in other)
            + "; a new table needs another --folder"
        )
    return rows


def show(rows: Iterable[dict[str, Any]]) -> str:
    """Return the table in Markdown: means over seeds, with standard deviations."""
    found = _by_model(rows)
    base = found.get(BASE, {}).get("perplexity", [math.nan])[0]
    lines = [
        line(("method", "experts", "tuned", "seeds", "rise", *COLUMNS)),
        line(["---"] * (5 + len(COLUMNS))),
    ]
    for name, figures in found.items():
        rises = [100 * (each / base - 1) for each in figures["perplexity"]]
        stderr = statistics.fmean(figures["accuracy, stderr"])
        cells = {metric: _spread(figures[metric], *form) for metric, form in COLUMNS.items()}
        cells["accuracy"] += f" (stderr {stderr:.3f})"
        lines.append(line((*name, str(len(rises)), _spread(rises, 1, ".2f"), *cells.values())))
    return "\n".join(lines) + "\n"


def show_positions(rows: Iterable[dict[str, Any]], metric: str) -> str:
    """Return a metric by position in Markdown, of models that were not fine-tuned."""
    found = {
        name: figures for name, figures in _by_model(rows).items() if name[1:] == ("native", "no")
    }
    start = f"{metric}, positions "
    places = [each for each in found.get(BASE, {}) if each.startswith(start)]
    lines = [line(("method", *(each.removeprefix(start) for each in places)))]
    lines.append(line(["---"] * (1 + len(places))))
    for name, figures in found.items():
        lines.append(line((name[0], *(_spread(figures[each], 1, ".4g") for each in places))))
    return "\n".join(lines) + "\n"


def _by_model(rows: Iterable[dict[str, Any]]) -> dict[Name, dict[str, list[float]]]:
    """Return each model's values of all seeds by metric."""
    found: dict[Name, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for each in rows:
        case = each["case"]
        if SETTING not in case:
            name = (case["method"], case["experts"], case["tuned"])
            found[name][each["metric"]].append(each["value"])
    return found


def line(cells: Iterable[str]) -> str:
    """Return a line of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def show_row(case: Case, figures: Figures) -> str:
    """Return one finished row as a line."""
    name = ", ".join(f"{key} {value}" for key, value in case.items())
    cells = ", ".join(f"{metric} {figures[metric][0]:.6g}" for metric in COLUMNS)
    return f"{name}: {cells}"


def _spread(values: list[float], unit: float, form: str) -> str:
    """Return the mean and, of several values, the standard deviation."""
    values = [value / unit for value in values]
    mean = format(statistics.fmean(values), form)
    return mean if len(values) < 2 else f"{mean} ± {format(statistics.stdev(values), form)}"


def _key(case: dict[str, Any]) -> str:
    return json.dumps(case, sort_keys=True)
