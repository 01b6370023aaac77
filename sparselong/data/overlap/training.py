"""Warnings before training that the rows hold items with which stage 04 will measure the model.

Stage 04 compares the same texts in the same way, but after the hours of training. Here the network
is not used: the demo's items are made if its rows are trained on (that takes seconds), those of
other tasks are read if an earlier evaluation left them on this machine, within a minute. RULER's
are drawn at random and are not looked for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sparselong.config import RULER_TASKS, Config
from sparselong.data.demo import write_hellaswag
from sparselong.data.overlap.contamination import warn_of_items
from sparselong.data.tasks import DEMO_TASK

_PROGRAM = "sparselong.data.overlap.items"
_SECONDS = 60.0
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def warn_before_training(config: Config, train_path: Path, tokenizer: Any) -> list[str]:
    """Return warnings of evaluation items in the training rows, and of tasks not compared.

    Args:
        config: names the tasks.
        train_path: the prepared training file.
        tokenizer: the base's, from which the demo's items are made.
    """
    limit = config.evaluation.limit
    others = [name for name in config.evaluation.tasks if name not in (DEMO_TASK, *RULER_TASKS)]
    items: dict[str, list[str]] = {}
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        if DEMO_TASK in config.evaluation.tasks and config.data.train != "demo":
            missing[DEMO_TASK] = "made from the demo's text, which data.train does not name"
        elif DEMO_TASK in config.evaluation.tasks:
            path = Path(scratch) / "items.jsonl"
            write_hellaswag(path, tokenizer, config.seed)
            lines = path.read_text(encoding="utf-8").splitlines()[:limit]
            items[DEMO_TASK] = [_describe_demo(json.loads(line)) for line in lines]
        if others:
            found = _read_others(others, limit, Path(scratch) / "items.json")
            items, missing = items | found["items"], missing | found["missing"]
    warnings = warn_of_items(items, train_path)
    if missing:
        why = "; ".join(dict.fromkeys(missing.values()))
        warnings.append(
            f"training rows are not compared yet with the items of {', '.join(missing)}; 04_eval "
            f"compares them ({why})"
        )
    return warnings


def _describe_demo(row: dict[str, Any]) -> str:
    return f"{row['activity_label']}: {row['ctx']} {row['endings'][row['label']]}"


def _read_others(names: list[str], limit: int | None, path: Path) -> dict[str, dict[str, Any]]:
    """Return `items` by task, and by name why others are `missing`."""
    command = [sys.executable, "-m", _PROGRAM, str(path), str(limit or 0), *names]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **_OFFLINE},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"items": {}, "missing": dict.fromkeys(names, f"not read in {_SECONDS:.0f} s")}
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"]
        return {"items": {}, "missing": dict.fromkeys(names, lines[-1])}
    return json.loads(path.read_text(encoding="utf-8"))
