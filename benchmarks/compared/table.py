"""The rows of the table, finished now or by an earlier run, and how they are shown."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.compared.measuring import Figures
from benchmarks.record import row

BACKEND, SETTING = "sparselong", "setting"
SHOWN = ("perplexity", "kl", "top-1 agreement", "accuracy", "tuned perplexity", "bytes", "seconds")
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
        )
    return rows


def show(rows: Iterable[dict[str, Any]]) -> str:
    """Return the table as text: means over seeds, and standard deviations where there are some."""
    found: dict[tuple, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for each in rows:
        if SETTING not in each["case"]:
            case = each["case"]
            name = (case["method"], case["experts"], case["tuned"])
            found[name][each["metric"]].append(each["value"])
    lines = [" | ".join(("method", "experts", "tuned", "seeds", *SHOWN))]
    for name, figures in found.items():
        seeds = len(figures["perplexity"])
        cells = [_spread(figures[metric]) for metric in SHOWN]
        lines.append(" | ".join((*name, str(seeds), *cells)))
    return "\n".join(lines)


def show_row(case: Case, figures: Figures) -> str:
    """Return one finished row as a line."""
    name = ", ".join(f"{key} {value}" for key, value in case.items())
    cells = ", ".join(f"{metric} {figures[metric][0]:.5g}" for metric in SHOWN)
    return f"{name}: {cells}"


def _spread(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.5g}" if values else ""
    return f"{statistics.fmean(values):.5g} ± {statistics.stdev(values):.2g}"


def _key(case: dict[str, Any]) -> str:
    return json.dumps(case, sort_keys=True)
