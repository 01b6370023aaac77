"""How the trainer's process tells the stage's process why it stopped.

An expected failure, wherever in Axolotl's call tree it is raised, ends as an uncaught exception:
Python's own last resort, `sys.excepthook`, writes what / expected / found / fix into failure.json,
and the stage raises the same failure. Everything else keeps its traceback, which is in log.txt.

Of several ranks each has a file of its own. When one ends, the others fail at their next exchange
with it; `lost_others` tells these failures from the one that has to be told.
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


def failure_path(work: Path, rank: int) -> Path:
    """Where a rank's failure is written."""
    return work / (FAILURE if rank == 0 else f"failure.rank{rank}.json")


def tell_failures(work: Path, rank: int = 0) -> None:
    """From now on, an expected failure that ends this process is written to `failure_path`."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        traceback.print_exception(kind, error, trace)
        told = explain(error, work)
        if told is not None:
            write_failure(work, rank, told)

    sys.excepthook = hook


def write_failure(work: Path, rank: int, failure: ExpectedError) -> None:
    """Leaves a failure for the stage's process to tell."""
    document = {key: getattr(failure, key) for key in ("what", "expected", "found", "fix")}
    failure_path(work, rank).write_text(json.dumps(document), encoding="utf-8")


def read_failure(work: Path, rank: int = 0) -> StageError | None:
    """The failure that a rank's trainer left, if it left one."""
    path = failure_path(work, rank)
    if not path.exists():
        return None
    try:
        return StageError(**json.loads(path.read_text(encoding="utf-8")))
    except ValueError:  # a full disk cut it off
        return _disk_is_full(work, f"an unfinished {path.name}")


def lost_others(failure: StageError) -> bool:
    """Whether a failure only says that another rank has failed, or took no part in an exchange.

    These are the words of parallel.collectives and parallel.watch.
    """
    return any(text in failure.what for text in ("could not finish the exchange", " ends, since "))


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
