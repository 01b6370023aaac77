"""Write and find benchmark results, in the format that tables, plots and tests read."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from sparselong import provenance
from sparselong.files import write_atomically

RESULTS = Path(__file__).resolve().parent / "results"


def row(case: dict[str, Any], backend: str, metric: str, value: float, unit: str) -> dict[str, Any]:
    """Return one figure: the case, the backend, and the value of a metric with its unit."""
    return {"case": case, "backend": backend, "metric": metric, "value": value, "unit": unit}


def write(
    subject: str,
    machine: str,
    command: str,
    rows: list[dict[str, Any]],
    folder: Path = RESULTS,
    made_on: dict[str, Any] | None = None,
) -> Path:
    """Write `<folder>/<subject>-<machine>-<YYYYMMDD>.json`, whole or not at all; return its path.

    Args:
        subject: what was measured, as the stem of the benchmark's file name.
        machine: a short name for file names, for example `h200` or `cpu2`.
        command: the command that produced these figures.
        rows: figures from `row`.
        folder: directory of the result.
        made_on: a manifest with `hardware` and `versions` of the run; None describes this machine.
    """
    software = made_on or provenance.describe_software()
    document = {
        "subject": subject,
        "command": command,
        "machine": made_on["hardware"] if made_on else provenance.describe_hardware(),
        "versions": software["versions"],
        "git_commit": software["git_commit"],
        "git_dirty": software["git_dirty"],
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(subject, machine, folder)
    write_atomically(path, json.dumps(document, indent=1) + "\n")
    return path


def path_of(subject: str, machine: str, folder: Path) -> Path:
    """Return where `write` puts today's result."""
    return folder / f"{subject}-{machine}-{time.strftime('%Y%m%d')}.json"


def newest(subject: str) -> dict[str, dict[str, Any]]:
    """Return the newest document of a subject for each machine, with its `file` name."""
    found = {}
    for path in sorted(RESULTS.glob(f"{subject}-*.json"), key=lambda p: p.stem.rsplit("-", 1)[1]):
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["subject"] == subject:
            found[path.stem.split("-")[1]] = document | {"file": path.name}
    return found
