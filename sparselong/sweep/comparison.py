"""The runs of a sweep side by side, from nothing but what each run's own stage 03 has recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparselong.figures import format_bytes
from sparselong.files import write_atomically
from sparselong.run import read_manifest
from sparselong.sweep.runs import STAGE, Run

TABLE, DOCUMENT = "sweep.md", "sweep.json"
_FIGURES = (
    *("steps", "train_loss", "best_eval_perplexity", "best_step", "tokens"),
    *("trainable_parameters", "tokens_per_second", "gpu_hours", "cost"),
)
"""Keys of the manifest's metrics that the comparison repeats."""
_FORMATS = {
    **dict.fromkeys(("train_loss", "best_eval_perplexity"), "{:.4f}"),
    **dict.fromkeys(("steps", "best_step", "tokens", "trainable_parameters"), "{:,}"),
    **dict.fromkeys(("tokens_per_second", "seconds"), "{:,.0f}"),
    **dict.fromkeys(("gpu_hours", "cost"), "{:,.2f}"),
}


def compare(runs: Sequence[Run], failures: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """Return the comparison of a sweep's runs as JSON.

    Args:
        runs: the runs; some may not be finished.
        failures: the four lines of each that failed, by name.
    """
    rows = [_row(run, failures.get(run.name)) for run in runs]
    done = [row for row in rows if row["status"] == "done"]
    notes = _differences(runs, done)
    best = min(done, key=lambda row: row["best_eval_perplexity"], default=None)
    return {
        "stage": STAGE,
        "status": "done" if len(done) == len(rows) else "failed" if failures else "unfinished",
        "runs": rows,
        "best": best["name"] if best is not None and not notes else None,
        "notes": notes,
    }


def _row(run: Run, failure: Mapping[str, str] | None) -> dict[str, Any]:
    """Return a run's figures; without a result only how far it is."""
    row: dict[str, Any] = {"name": run.name, "directory": str(run.dir), "values": run.values}
    manifest = read_manifest(run.dir, STAGE)
    if failure is not None or manifest is None:
        status = "failed" if failure is not None else "not finished"
        return {**row, "status": status, **({"failure": dict(failure)} if failure else {})}
    metrics = manifest["metrics"]
    return {
        **row,
        "status": "done",
        **{name: metrics.get(name) for name in _FIGURES},
        "gpu_hours": metrics.get("gpu_hours") or None,  # none on a processor
        "peak_bytes": max(manifest["peak_bytes"].values()),
        "seconds": manifest["seconds"],
        "validation": [
            each["sha256"] for each in manifest["inputs"] if "validation" in Path(each["path"]).name
        ],
    }


def _differences(runs: Sequence[Run], done: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return why perplexities cannot be compared; nothing if they can be."""
    names = {row["name"] for row in done}
    finished = [run.config for run in runs if run.name in names]
    notes = []
    if len({tuple(row["validation"]) for row in done}) > 1:
        notes.append("Runs differ in their validation conversations: perplexities do not compare.")
    for key, values in (
        ("sequence_len", {config.sequence_len for config in finished}),
        ("data.train_on", {config.data.train_on for config in finished}),
        ("data.date", {config.data.date for config in finished}),
        ("model.base", {config.model.base for config in finished}),
    ):
        if len(values) > 1:
            notes.append(
                f"Runs differ in {key}, which decides the tokens that validation counts: "
                "perplexities do not compare."
            )
    return notes


def write(document: Mapping[str, Any], folder: Path) -> None:
    """Write the comparison to the sweep's directory, as a table and as JSON."""
    write_atomically(folder / TABLE, format_comparison(document) + "\n")
    write_atomically(folder / DOCUMENT, json.dumps(document, indent=1) + "\n")


def format_comparison(document: Mapping[str, Any]) -> str:
    """Return the comparison as Markdown."""
    rows = document["runs"]
    columns = {
        **{key: [_show(row["values"][key]) for row in rows] for key in rows[0]["values"]},
        "status": [row["status"] for row in rows],
        "validation perplexity": _figures(rows, "best_eval_perplexity"),
        "at step": _figures(rows, "best_step"),
        "of steps": _figures(rows, "steps"),
        "training loss": _figures(rows, "train_loss"),
        "trained parameters": _figures(rows, "trainable_parameters"),
        "tokens/s": _figures(rows, "tokens_per_second"),
        "peak memory": [format_bytes(r["peak_bytes"]) if "peak_bytes" in r else "" for r in rows],
        "seconds": _figures(rows, "seconds"),
        "GPU hours": _figures(rows, "gpu_hours"),
        "cost": _figures(rows, "cost"),
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(cells)} |" for cells in zip(*columns.values(), strict=True)]
    if document["best"] is not None:
        lines += ["", f"Lowest validation perplexity: {document['best']}"]
    lines += ["", *document["notes"]] if document["notes"] else []
    for row in rows:
        if "failure" in row:
            lines += ["", f"{row['name']} failed: {row['failure']['what']}"]
    return "\n".join(lines)


def _figures(rows: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    figures = [row.get(name) for row in rows]
    return ["" if figure is None else _FORMATS[name].format(figure) for figure in figures]


def _show(value: Any) -> str:
    """Return a value as a cell; a string as it is, but for what would end the cell."""
    text = value if isinstance(value, str) else json.dumps(value)
    return " ".join(text.replace("|", "\\|").split())
