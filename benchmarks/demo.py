#!/usr/bin/env python3
"""Record the figures of a run from its four manifests and its metrics.jsonl.

benchmarks/demo.py [RUN_DIR [MACHINE [COMMAND]]]      runs/demo, cpuN, make demo
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.record import row, write
from sparselong.run import read_manifest

STAGES = ("01_health", "02_compress", "03_finetune", "04_eval")


def read_manifests(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Return the stages' manifests; exit if a stage is not done."""
    manifests = {}
    for stage in STAGES:
        manifest = read_manifest(run_dir, stage)
        if manifest is None:
            sys.exit(f"{stage} is not done in {run_dir}: run make demo first")
        manifests[stage] = manifest
    return manifests


def collect(manifests: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each stage's seconds, peak bytes and scalar metrics."""
    rows = []
    for stage, manifest in manifests.items():
        rows.append(row({"stage": stage}, "pipeline", "seconds", manifest["seconds"], "s"))
        rows += _scalars(stage, manifest["metrics"], ())
    return rows


def _scalars(stage: str, value: Any, path: tuple[str, ...]) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        return [r for key in value for r in _scalars(stage, value[key], (*path, str(key)))]
    if isinstance(value, list):
        return _scalars(stage, dict(enumerate(value)), path)
    if isinstance(value, bool | int | float):
        unit = "bytes" if "bytes" in ".".join(path) else "1"
        return [row({"stage": stage}, "pipeline", ".".join(path), float(value), unit)]
    return []


def collect_steps(run_dir: Path) -> list[dict[str, Any]]:
    """Return the loss and the speed of each step of stage 03."""
    units = {"loss": "nats", "tokens_per_second": "tokens/s"}
    lines = (run_dir / "03_finetune/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        row({"stage": "03_finetune", "step": found["step"]}, "pipeline", key, found[key], unit)
        for found in map(json.loads, lines)
        for key, unit in units.items()
        if key in found
    ]


def collect_base(run_dir: Path) -> list[dict[str, Any]]:
    """Return the metrics of the tiny model from when it was created."""
    record = json.loads((run_dir / "base" / "tiny.json").read_text(encoding="utf-8"))
    return _scalars("base", record["metrics"], ())


if __name__ == "__main__":
    run_dir, machine, command = [
        *sys.argv[1:],
        *("runs/demo", f"cpu{os.cpu_count()}", "make demo")[len(sys.argv) - 1 :],
    ]
    manifests = read_manifests(Path(run_dir))
    print(
        write(
            "demo",
            machine,
            command,
            [
                *collect_base(Path(run_dir)),
                *collect(manifests),
                *collect_steps(Path(run_dir)),
            ],
            made_on=manifests["04_eval"],
        )
    )
