"""How the trainer's process tells the stage's process why it stopped.

An expected failure, wherever in Axolotl's call tree it is raised, ends as an uncaught exception:
Python's own last resort, `sys.excepthook`, writes what / expected / found / fix into failure.json,
and the stage raises the same failure. Everything else keeps its traceback, which is in log.txt.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from types import TracebackType

import torch

from sparselong.errors import ExpectedError, StageError

FAILURE = "failure.json"
_FULL = ("No space left on device", "Disk quota exceeded", "file write failed", "unexpected pos ")
"""How OSError, safetensors and torch's zip writer say that the disk is full."""


def tell_failures(work: Path) -> None:
    """From now on, an expected failure that ends this process is written to `work/failure.json`."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        traceback.print_exception(kind, error, trace)
        told = explain(error, work)
        if told is not None:
            document = {key: getattr(told, key) for key in ("what", "expected", "found", "fix")}
            (work / FAILURE).write_text(json.dumps(document), encoding="utf-8")

    sys.excepthook = hook


def read_failure(work: Path) -> StageError | None:
    """The failure that the trainer left, if it left one."""
    path = work / FAILURE
    if not path.exists():
        return None
    try:
        return StageError(**json.loads(path.read_text(encoding="utf-8")))
    except ValueError:  # a full disk cut it off
        return _disk_is_full(work, "an unfinished failure.json")


def explain(error: BaseException, work: Path) -> ExpectedError | None:
    """What a person should be told about an exception; None for what looks like a bug."""
    if isinstance(error, ExpectedError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return StageError(
            "the GPU's memory does not suffice",
            "the micro-batch to fit beside the model",
            str(error).splitlines()[0],
            "lower sequence_len or micro_batch_size, or set training.gradient_checkpointing=true",
        )
    if any(text in str(error) for text in _FULL):
        return _disk_is_full(work, str(error).splitlines()[0])
    return None


def _disk_is_full(work: Path, found: str) -> StageError:
    return StageError(
        f"03_finetune could not write to {work}",
        "room on the disk",
        found,
        "free some space, then run the same command again: whole checkpoints are kept",
    )
