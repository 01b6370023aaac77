"""How the trainer's process tells the stage's process why it stopped.

An expected failure, wherever in Axolotl's call tree it is raised, ends as an uncaught exception:
Python's own last resort, `sys.excepthook`, writes what / expected / found / fix into failure.json,
and the stage raises the same failure. Everything else keeps its traceback, which is in log.txt.

Of several ranks each has a file of its own. When one ends, the others fail at their next exchange
with it; these failures say of themselves that they are a consequence.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from types import TracebackType

from sparselong.errors import ExpectedError, StageError
from sparselong.files import is_disk_full

FAILURE = "failure.json"


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
    document = {**failure.explanation(), "consequence": failure.consequence}
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


def explain(error: BaseException, work: Path) -> ExpectedError | None:
    """Return what a person should be told about an exception; None for what looks like a bug.

    Args:
        work: the stage's directory, which has its name.
    """
    if isinstance(error, ExpectedError):
        return error
    import torch  # not before: the stage's own process reads failures and refuses without torch

    if isinstance(error, torch.OutOfMemoryError):
        return StageError(
            "the GPU's memory does not suffice",
            "the micro-batch to fit beside the model",
            str(error).splitlines()[0],
            "lower sequence_len or micro_batch_size, or set training.gradient_checkpointing=true",
        )
    if is_disk_full(error):
        return _disk_is_full(work, str(error).splitlines()[0])
    return None


def _disk_is_full(work: Path, found: str) -> StageError:
    return StageError(
        f"{work.name} could not write to {work}",
        "room on the disk",
        found,
        "free some space, then run the same command again: whole checkpoints are kept",
    )
