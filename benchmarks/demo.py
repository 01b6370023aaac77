#!/usr/bin/env python3
"""The demo's own figures, taken from the manifests that `make demo` left in runs/demo."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.record import row, write
from sparselong.run import read_manifest

RUN = Path(__file__).resolve().parent.parent / "runs/demo"
STAGES = ("01_health", "02_compress", "03_finetune", "04_eval")


def collect(run_dir: Path) -> list[dict[str, Any]]:
    """One row per scalar metric and stage; SystemExit where a stage is not done."""
    rows = []
    for stage in STAGES:
        manifest = read_manifest(run_dir, stage)
        if manifest is None:
            sys.exit(f"{stage} is not done in {run_dir}: run make demo first")
        rows.append(row({"stage": stage}, "pipeline", "seconds", manifest["seconds"], "s"))
        rows += _scalars(stage, manifest["metrics"], ())
    return rows


def _scalars(stage: str, value: Any, path: tuple[str, ...]) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        return [r for key in value for r in _scalars(stage, value[key], (*path, key))]
    if isinstance(value, bool | int | float):
        unit = "bytes" if "bytes" in ".".join(path) else "1"
        return [row({"stage": stage}, "pipeline", ".".join(path), float(value), unit)]
    return []


if __name__ == "__main__":
    print(write("demo", f"cpu{os.cpu_count()}", "make demo", collect(RUN)))
