"""Measuring one model after another, with each result kept in its own file.

Only one model is open at a time: base, compressed and fine-tuned together would need three times
the memory. A finished model's figures are kept in `04_eval/<model>.json` with a fingerprint of its
files and of what was asked. After an interruption, or with more models to compare, only those are
measured that are missing there, have been rebuilt since, or were asked something else.
"""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparselong.evaluate import perplexity
from sparselong.evaluate.divergence import STATES, is_saved
from sparselong.evaluate.opened import Measured, measure_opened
from sparselong.evaluate.spread import Spread
from sparselong.evaluate.tasks import Suite, grade
from sparselong.evaluate.work import BASE, Mark, Questions
from sparselong.files import load_json, write_atomically
from sparselong.model import describe_placement, implementation, load_model
from sparselong.provenance import read_peaks, reset_peaks
from sparselong.run import Stage
from sparselong.runtime import using

_RESULT = (
    *("fingerprint", "perplexity", "divergence", "health", "tasks", "speed"),
    *("seconds", "peak_bytes"),
)
"""Keys of a model's kept result."""


@dataclass(frozen=True)
class Measurements:
    """Tasks and conversations that every model is measured on.

    Attributes:
        suite: the tasks.
        questions: what they ask.
        samples: the conversations.
    """

    suite: Suite
    questions: Questions
    samples: list[perplexity.Sample]

    def digest(self) -> str:
        """Return a hash of the questions and conversations."""
        texts = [[sample.input_ids, sample.supervised] for sample in self.samples]
        return hashlib.sha256(json.dumps([self.questions, texts]).encode()).hexdigest()


def measure(mark: Mark, measurements: Measurements, stage: Stage) -> dict[str, Any]:
    """Return one model's figures, from `04_eval/<name>.json` if up to date.

    Returns:
        {fingerprint, tasks (`tasks.grade`), perplexity, divergence and health (`opened.Measured`),
        speed (load_seconds, prompts: `answering.measure_speed`), seconds, peak_bytes by device,
        experts (`model.describe_placement`)}.

    Raises:
        StageError: the checkpoint cannot be opened.
    """
    kept = find_kept(mark, stage.dir, stage.log)
    if kept and not mark.only_states:
        return kept
    start = time.monotonic()
    reset_peaks()
    found, loaded, experts = _open_and_measure(mark, measurements, stage)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if kept or found is None:
        assert kept is not None
        return kept
    result = {
        "fingerprint": mark.fingerprint,
        "perplexity": found.perplexity,
        "divergence": found.divergence,
        "health": found.health,
        "tasks": grade(measurements.suite, found.answers),
        "speed": {"load_seconds": loaded, "prompts": found.prompts},
        "seconds": round(time.monotonic() - start, 1),
        "peak_bytes": read_peaks(),
        "experts": experts,
    }
    return keep(mark.name, result, stage.dir, stage.log)


def _open_and_measure(
    mark: Mark, measurements: Measurements, stage: Stage
) -> tuple[Measured | None, float, dict[str, Any]]:
    """Return what `measure_opened` does, seconds of loading, and where experts were."""
    start = time.monotonic()
    suite = measurements.suite
    config = suite.config
    model = load_model(Path(mark.directory), attn_implementation=implementation(config))
    loaded = round(time.monotonic() - start, 3)
    stage.log(f"{mark.name}: loaded from {mark.directory} in {loaded:.1f} s")
    spread = Spread(report=lambda what, *count: stage.report(f"{mark.name}: {what}", *count))
    told = measurements.questions, measurements.samples, suite.tokenizer, config
    with using(attention_backend=config.attention_backend, deterministic=config.deterministic):
        found = measure_opened(mark, model, *told, spread, stage.dir)
    return found, loaded, describe_placement(model)


def find_kept(
    mark: Mark, folder: Path, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any] | None:
    """Return one model's result from `folder/<name>.json`, or None if it must be measured."""
    name = mark.name
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    kept = _read_kept(path)
    if kept is None:
        progress(f"{name}: {path} is damaged, so the model is measured again")
        return None
    if kept["fingerprint"] != mark.fingerprint:
        return None
    progress(f"{name}: already measured, result kept")
    return kept


def lacks_states(marks: list[Mark], folder: Path) -> bool:
    """Return whether others must be compared with the base, which has left no hidden states."""
    missing = [mark for mark in marks if find_kept(mark, folder) is None]
    is_kept = BASE not in [mark.name for mark in missing]
    return is_kept and any(mark.has_base_head for mark in missing) and not is_saved(folder / STATES)


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
    for name, task in result["tasks"].items():
        shown = {"acc": task["acc"]} if "acc" in task else {}
        shown |= {label: score["value"] for label, score in task["scores"].items()}
        known = {label: value for label, value in shown.items() if value is not None}
        figures += [f"{name} {label} {value:.3f}" for label, value in known.items()]
    return f"{', '.join(figures)} ({result['seconds']:.0f} s)"
