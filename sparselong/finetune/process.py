"""The trainer as a process of its own: started, listened to, stopped with us, and explained.

Axolotl imports for 20 seconds, prints much and sets global state, so it never runs in the stage's
process. Its whole output goes to log.txt; lines that our plugin marks are shown. The process cannot
outlive the stage: it gets SIGTERM when the stage is interrupted, and the kernel kills it when the
stage's process is killed (else two trainers could write one run directory).
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import sparselong
from sparselong.errors import StageError
from sparselong.finetune.callbacks import MARK
from sparselong.finetune.failure import FAILURE, read_failure
from sparselong.run import Stage

_PR_SET_PDEATHSIG = 1
_LAST_LINES = 12
_GRACE_SECONDS = 20


def run_trainer(stage: Stage, command: Sequence[str]) -> None:
    """Runs the trainer to its end.

    Args:
        stage: whose log.txt takes the output.
        command: the program and its arguments.

    Raises:
        StageError: the trainer failed; with its own explanation where it left one.
    """
    (stage.dir / FAILURE).unlink(missing_ok=True)
    last: deque[str] = deque(maxlen=_LAST_LINES)
    with (
        (stage.dir / "log.txt").open("a", encoding="utf-8") as log,
        subprocess.Popen(
            command,
            env=_environment(stage),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=_die_with_parent,
        ) as process,
    ):
        try:
            for line in process.stdout or ():
                log.write(line)
                log.flush()
                if line.startswith(MARK):
                    print(line.removeprefix(MARK), end="", file=sys.stderr, flush=True)
                elif line.strip():
                    last.append(line.rstrip())
            code = process.wait()
        except BaseException:
            _stop(process)
            raise
    failure = read_failure(stage.dir)
    if failure is not None:
        raise failure
    if code != 0:
        raise StageError(
            f"the trainer ended with {_name(code)}",
            "exit code 0",
            "its last lines were:\n  " + "\n  ".join(last),
            f"see {stage.dir / 'log.txt'}; the same command goes on from the last whole checkpoint",
        )


def _environment(stage: Stage) -> dict[str, str]:
    """Everything is local by now, so the hub is left alone; caches stay in the run directory.

    Threads that wait sleep instead of spinning: where other programs want the processor too, a
    spinning wait for a thread that is not running costs up to 60 times the work itself.
    """
    root = str(Path(sparselong.__file__).parents[1])
    paths = [root, os.environ.get("PYTHONPATH", "")]
    environment = {
        "OMP_WAIT_POLICY": "PASSIVE",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str((stage.dir / "prepared" / "cache").resolve()),
        "AXOLOTL_DO_NOT_TRACK": "1",
    }
    return environment


def _die_with_parent() -> None:
    """In the child, before exec: be killed when the parent dies (only Linux can)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


def _name(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
