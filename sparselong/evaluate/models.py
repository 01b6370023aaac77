"""Measuring one model after another, with each result kept in its own file.

Only one model is open at a time: base, compressed and fine-tuned together would need three times
the memory. A finished model's figures are kept in `04_eval/<model>.json` with a fingerprint of its
files. After an interruption, only models that are missing there, or that an earlier stage has
rebuilt since, are measured.
"""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparselong.evaluate import harness, perplexity
from sparselong.evaluate.spread import Spread
from sparselong.files import load_json, write_atomically
from sparselong.model import describe_placement, implementation, load_model
from sparselong.provenance import read_peaks, reset_peaks
from sparselong.run import Stage
from sparselong.runtime import using

_RESULT = ("fingerprint", "perplexity", "tasks", "seconds", "peak_bytes")
"""Keys of a model's kept result."""


@dataclass(frozen=True)
class Measurements:
    """Tasks and conversations that every model is measured on."""

    suite: harness.Suite
    samples: list[perplexity.Sample]


def measure(
    name: str,
    directory: Path,
    fingerprint: str,
    measurements: Measurements,
    stage: Stage,
) -> dict[str, Any]:
    """Return one model's accuracy and perplexity, from `04_eval/<name>.json` if up to date.

    Returns:
        {fingerprint, tasks (harness.measure), perplexity (perplexity.measure), seconds,
        peak_bytes by device, experts (`model.describe_placement`)}.

    Raises:
        StageError: the checkpoint cannot be opened.
    """
    if kept := find_kept(name, fingerprint, stage.dir, stage.log):
        return kept
    start = time.monotonic()
    reset_peaks()
    config = measurements.suite.config
    model = load_model(directory, attn_implementation=implementation(config))
    stage.log(f"{name}: loaded from {directory} in {time.monotonic() - start:.1f} s")
    batch_size = config.evaluation.batch_size
    spread = Spread(report=partial(stage.report, f"{name}: batch"))
    answered = partial(stage.report, f"{name}: answer")
    with using(attention_backend=config.attention_backend, deterministic=config.deterministic):
        result = {
            "fingerprint": fingerprint,
            "perplexity": perplexity.measure(model, measurements.samples, batch_size, spread),
            "tasks": harness.measure(model, measurements.suite, answered),
            "seconds": round(time.monotonic() - start, 1),
            "peak_bytes": read_peaks(),
            "experts": describe_placement(model),
        }
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return keep(name, result, stage.dir, stage.log)


def find_kept(
    name: str, fingerprint: str, folder: Path, progress: Callable[[str], None]
) -> dict[str, Any] | None:
    """Return one model's result from `folder/<name>.json`, or None if it must be measured."""
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    kept = _read_kept(path)
    if kept is None:
        progress(f"{name}: {path} is damaged, so the model is measured again")
        return None
    if kept["fingerprint"] != fingerprint:
        return None
    progress(f"{name}: already measured, result kept")
    return kept


def keep(
    name: str, result: dict[str, Any], folder: Path, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Write a model's result to `folder/<name>.json`, and return it."""
    write_atomically(folder / f"{name}.json", json.dumps(result) + "\n")
    progress(f"{name}: {_one_line(result)}")
    return result


def _read_kept(path: Path) -> dict[str, Any] | None:
    """Return the result in a file that `measure` wrote, or None if it is damaged."""
    try:
        kept = load_json(path)
    except (OSError, ValueError):
        return None
    return kept if set(_RESULT) <= set(kept) else None


def fingerprint(files: list[dict[str, Any]]) -> str:
    """Return a hash of a manifest's list of files (their paths and sha256)."""
    text = json.dumps([[file["path"], file["sha256"]] for file in files])
    return hashlib.sha256(text.encode()).hexdigest()


def _one_line(result: dict[str, Any]) -> str:
    figures = [f"perplexity {result['perplexity']['supervised']['perplexity']:.3f}"]
    figures += [f"{name} acc {task['acc']:.3f}" for name, task in result["tasks"].items()]
    return f"{', '.join(figures)} ({result['seconds']:.0f} s)"
