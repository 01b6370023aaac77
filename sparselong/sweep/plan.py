"""The plan of a sweep: its runs, whether each makes its stage 02, time, memory and cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparselong.figures import format_bytes, format_seconds
from sparselong.memory import Plan, cost_lines, format_table
from sparselong.run import stage_hash
from sparselong.sweep.runs import STAGE, Run
from sparselong.sweep.sharing import COMPRESS


class Planned(NamedTuple):
    """A run that was checked.

    Attributes:
        run: the run.
        state: how far stage 03 is: `finished`, `unfinished` or `new`.
        origin: run directory with a finished stage 02 for its keys; None: there is none.
        plan: the planner's results.
    """

    run: Run
    state: str
    origin: Path | None
    plan: Plan


def describe(planned: Sequence[Planned], folder: Path) -> dict[str, Any]:
    """Return the plan of a sweep as JSON; finished runs take no time."""
    makers: dict[str, Path] = {}
    rows, totals = [], {}
    for run, state, origin, plan in planned:
        origin = origin or makers.setdefault(stage_hash(run.config, COMPRESS), run.dir)
        makes = origin == run.dir and origin in makers.values()
        stages = [] if state == "finished" else [*([COMPRESS] if makes else []), STAGE]
        estimates = [one.describe(stages) for one in plan.estimates]
        for one in estimates:
            total = totals.setdefault(one["gpu"], {**one, "hours": 0, "gpu_hours": 0, "cost": 0})
            _add(total, one)
        rows.append(
            {
                "name": run.name,
                "directory": str(run.dir),
                "values": run.values,
                "status": state,
                "compressed": "made" if makes else str(origin),
                "peak_bytes_per_gpu": plan.memory.peak_bytes,
                "estimates": estimates,
            }
        )
    return {
        "stage": STAGE,
        "status": "plan",
        "directory": str(folder),
        "runs": rows,
        "estimates": list(totals.values()),
    }


def _add(total: dict[str, Any], one: Mapping[str, Any]) -> None:
    total["gpus"] = max(total["gpus"], one["gpus"])
    for key in ("hours", "gpu_hours"):
        total[key] += one[key]
    costs = (total["cost"], one["cost"])
    total["cost"] = None if None in costs else sum(costs)


def format_plan(document: Mapping[str, Any]) -> str:
    """Return the plan of a sweep as plain text."""
    rows = document["runs"]
    lines = [f"Sweep of {document['stage']}: {len(rows)} runs in {document['directory']}"]
    cells = {}
    for row in rows:
        (first, *_) = row["estimates"]
        here = {"made": "makes stage 02", row["directory"]: "has stage 02"}
        there = Path(row["compressed"])
        inside = there.parent == Path(document["directory"])
        other = f"stage 02 of {there.name if inside else there}"
        compressed = here.get(row["compressed"], other)
        cells[row["name"]] = (
            f"{row['status']}, {compressed}, {format_bytes(row['peak_bytes_per_gpu'])}, "
            f"{format_seconds(3600 * first['hours'])}"
        )
    lines += format_table("Run: state, model, peak memory, time", cells)
    (first, *_) = document["estimates"]
    lines.append(f"Estimated time of all: {format_seconds(3600 * first['hours'])} ({first['gpu']})")
    return "\n".join([*lines, *cost_lines(document["estimates"])])
