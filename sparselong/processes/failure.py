"""Report a trainer's failure from its process to the stage's process.

An expected failure, raised anywhere in Axolotl's call tree, ends as an uncaught exception.
`sys.excepthook` writes its what / expected / found / fix into failure.json, and the stage raises
the same failure. Any other exception only leaves its traceback in log.txt.

Each rank has its own file. When one rank ends, the others fail at their next exchange with it;
their failures are marked as a consequence.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from sparselong.errors import ExpectedError, StageError
from sparselong.figures import format_bytes
from sparselong.files import is_disk_full

FAILURE = "failure.json"
_TRAINING_FIX = (
    "lower sequence_len or micro_batch_size, or set training.gradient_checkpointing=true"
)
"""What helps if fine-tuning runs out of memory."""


class TrainerEnded(StageError):
    """A trainer's end that it did not explain itself; whether it comes again is not known."""


def failure_path(work: Path, rank: int) -> Path:
    """Return the path of a rank's failure file in the stage's directory."""
    return work / (FAILURE if rank == 0 else f"failure.rank{rank}.json")


def tell_failures(work: Path, rank: int = 0) -> None:
    """Install an excepthook that writes an expected failure to `failure_path`."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        traceback.print_exception(kind, error, trace)
        failure = explain(error, work)
        if failure is not None:
            write_failure(work, rank, failure)

    sys.excepthook = hook


def end_at_once() -> None:
    """Make an uncaught exception exit at once, so that backend threads cannot delay the exit."""
    tell = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        tell(kind, error, trace)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    sys.excepthook = hook


def write_failure(work: Path, rank: int, failure: ExpectedError) -> None:
    """Write a failure for the stage's process to report."""
    document = {**failure.explanation(), "consequence": failure.consequence}
    failure_path(work, rank).write_text(json.dumps(document), encoding="utf-8")


class OutOfMemory(StageError):
    """A GPU's lack of memory, with plan and use."""


@contextmanager
def telling_memory(moment: str = "", fix: str = _TRAINING_FIX) -> Iterator[None]:
    """Raise a GPU's lack of memory as OutOfMemory, for all ranks to see.

    Args:
        moment: what the block does, as in "while base was measured".
        fix: what to change.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(error, moment, fix) from error


def read_failure(work: Path, rank: int = 0) -> StageError | None:
    """Return the failure that a rank's trainer wrote, or None if there is none of its making."""
    path = failure_path(work, rank)
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # cut off by a full disk
        return _disk_is_full(work, f"an unfinished {path.name}")
    return _parse(document)


def _parse(document: Any) -> StageError | None:
    """Return the failure that `write_failure` wrote; None for anything else."""
    texts = ("what", "expected", "found", "fix")
    if not isinstance(document, dict) or set(document) - {"consequence"} != set(texts):
        return None
    if not all(isinstance(document[key], str) for key in texts):
        return None
    return StageError(**document)


def explain(error: BaseException, work: Path) -> ExpectedError | None:
    """Return an exception as an expected failure, or None if it looks like a bug.

    Args:
        error: what ended the process.
        work: the stage's directory, named after the stage.
    """
    if isinstance(error, ExpectedError):
        return error
    import torch  # here, so that the stage's process can read failures without importing torch

    if isinstance(error, torch.OutOfMemoryError):
        return _out_of_memory(error)
    if is_disk_full(error):
        return _disk_is_full(work, str(error).splitlines()[0])
    return None


def _out_of_memory(error: BaseException, moment: str = "", fix: str = _TRAINING_FIX) -> OutOfMemory:
    """Return the failure of a GPU without memory, with what was planned and what was in use."""
    import torch

    from sparselong.processes.sharing import decided_sharing

    plan, expected = decided_sharing(), "enough memory for the model and one micro-batch"
    if plan is not None:
        expected = f"a peak of {format_bytes(plan.predicted_peak_bytes)} by the plan"
        if plan.available_bytes is not None:
            expected += f", of at least {format_bytes(plan.available_bytes)} available on each GPU"
    found = (str(error) or type(error).__name__).splitlines()[0]
    if torch.cuda.is_available():
        peaks = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
        allocated, reserved = map(format_bytes, peaks)
        found = f"{allocated} allocated and {reserved} reserved at most; {found}"
    return OutOfMemory(
        f"the GPU ran out of memory {moment}".rstrip(),
        expected,
        f"{found} (plan: {format_bytes(plan.predicted_peak_bytes)})" if plan else found,
        fix,
    )


def _disk_is_full(work: Path, found: str) -> StageError:
    return StageError(
        f"{work.name} could not write to {work}",
        "enough free disk space",
        found,
        "free some space, then run the same command again: training continues from its last whole "
        "checkpoint, if there is one",
    )
