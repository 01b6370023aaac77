"""Run the trainers as child processes of the stage, and explain their failures.

The stage decides what each rank runs. A trainer (Axolotl's) takes 20 seconds to import, prints a
lot and sets global state, so it never runs in the stage's process. Rank 0 writes its output to
log.txt, rank N to log.rankN.txt; rank 0's marked lines (marks.py) are shown. The
trainers cannot outlive the stage: they get SIGTERM when the stage is interrupted, and the kernel
kills them when the stage's process is killed (otherwise two trainers could write to one run
directory).

When one rank fails, the others soon fail too, or wait for it forever. They get a few seconds to
write their failures and are then stopped. One failure is reported: the first one that was not
caused by another rank's.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sparselong.errors import StageError
from sparselong.processes.failure import TrainerEnded, failure_path, read_failure
from sparselong.processes.launch import World, joined_rank, rank_environments
from sparselong.processes.marks import MARK, PROGRESS, pass_on
from sparselong.processes.output import cause_of
from sparselong.registration import OutputError, add_defaults
from sparselong.run import Stage, remove_control

_PR_SET_PDEATHSIG = 1
_LAST_LINES = 400
"""Lines of output that are searched for the cause of a failure."""
_GRACE_SECONDS = 20
_SETTLE_SECONDS = 5.0
_POLL_SECONDS = 0.05
_NCCL_TIMEOUT = "caught collective operation timeout"
"""NCCL's watchdog aborts the process; this text in its log is the only trace."""
_ALONE: Mapping[int, Mapping[str, str]] = {0: {}}


@dataclass(frozen=True)
class Beside:
    """A process that works as rank 0 itself, beside the ranks that it started.

    Attributes:
        started: set when the ranks are.
        ended: set when it has done its part.
        tell: called with the first rank that fails before that.
    """

    started: threading.Event
    ended: threading.Event
    tell: Callable[[int], None]


class _Trainer:
    """A rank's process, a thread that reads its output and one that records when it ended.

    One thread could not do both: workers that outlive the process keep its output open.
    """

    def __init__(self, stage: Stage, command: Sequence[str], rank: int, extra: Mapping[str, str]):
        self.stage, self.rank, self.last = stage, rank, deque[str](maxlen=_LAST_LINES)
        self.ended: float | None = None
        self.timed_out = False
        name = "log.txt" if rank == 0 else f"log.rank{rank}.txt"
        self.log = stage.dir / name
        self.process = subprocess.Popen(
            command,
            env={**_environment(), **extra},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()
        threading.Thread(target=self._wait, daemon=True).start()

    def _listen(self) -> None:
        with self.log.open("a", encoding="utf-8") as log:
            for line in self.process.stdout or ():
                if line.startswith(PROGRESS):
                    if self.rank == 0:
                        with suppress(OutputError):  # unread output would stop the trainer
                            pass_on(line, self.stage)
                    continue
                log.write(remove_control(line))
                log.flush()
                self.timed_out |= _NCCL_TIMEOUT in line
                if not line.startswith(MARK):
                    if line.strip():
                        self.last.append(line.rstrip())
                elif self.rank == 0:
                    with suppress(OutputError):
                        self.stage.display.print(line.removeprefix(MARK).removesuffix("\n"))

    def _wait(self) -> None:
        self.process.wait()
        self.ended = time.monotonic()

    @property
    def failed(self) -> bool:
        return self.ended is not None and self.process.returncode != 0

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()

    def finish(self) -> None:
        """Wait for the stopped process, kill its children, and read the rest of its output."""
        try:
            self.process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.listener.join(_SETTLE_SECONDS)


def train_ranks(stage: Stage, arguments: Sequence[str], world: World) -> None:
    """Run the stage's trainer on each rank that this process starts.

    Args:
        stage: the running stage.
        arguments: the Python arguments, the same for each rank.
        world: the processes that work together.

    Raises:
        StageError: a rank failed.
    """
    import torch  # here, so that refusing a config needs no torch

    environments = rank_environments(world, torch.cuda.device_count())
    run_trainer(stage, [sys.executable, *arguments], environments)


def run_trainer(
    stage: Stage,
    command: Sequence[str],
    ranks: Mapping[int, Mapping[str, str]] = _ALONE,
    beside: Beside | None = None,
) -> None:
    """Run the trainers until all have ended or one has failed.

    Args:
        stage: the stage whose directory takes the output.
        command: the program and its arguments, the same for each rank.
        ranks: the ranks to start, each with its additional environment variables.
        beside: the process that is rank 0; None: all ranks are started.

    Raises:
        StageError: a trainer failed; carries its explanation if it wrote one.
    """
    for rank in ranks:
        failure_path(stage.dir, rank).unlink(missing_ok=True)
    trainers: list[_Trainer] = []
    try:
        for rank, extra in ranks.items():
            trainers.append(_Trainer(stage, command, rank, extra))
        if beside is not None:
            beside.started.set()
        while any(t.ended is None for t in trainers) and not any(t.failed for t in trainers):
            if beside is not None and beside.ended.wait(_POLL_SECONDS):
                break
            time.sleep(_POLL_SECONDS)
        if beside is not None and not beside.ended.is_set():
            for trainer in [t for t in trainers if t.failed][:1]:
                beside.tell(trainer.rank)
        settled = time.monotonic() + _SETTLE_SECONDS
        while any(t.ended is None for t in trainers) and time.monotonic() < settled:
            time.sleep(_POLL_SECONDS)
        unfinished = [t.rank for t in trainers if t.ended is None]
    finally:
        for trainer in trainers:
            trainer.stop()
        for trainer in trainers:
            trainer.finish()
    failed = [t for t in trainers if t.failed and t.rank not in unfinished]
    if failed:
        failed.sort(key=lambda trainer: trainer.ended or 0.0)
        several = any(ranks) or joined_rank() is not None
        raise _explain(stage, failed, unfinished, several)


def _explain(
    stage: Stage, failed: list[_Trainer], unfinished: list[int], several: bool
) -> StageError:
    """Return the failure to report, given the failed trainers in the order in which they ended."""
    failures = [(trainer, _failure_of(stage, trainer)) for trainer in failed]
    own = [pair for pair in failures if pair[1] is None or not pair[1].consequence]
    trainer, failure = (own or failures)[0]
    if failure is None:
        who = f"rank {trainer.rank} of {stage.name}" if several else "the trainer"
        return TrainerEnded(
            f"{who} ended with {_name(trainer.process.returncode)}",
            "exit code 0",
            "\n  ".join(_tell_end(trainer.process.returncode, cause_of(trainer.last))),
            f"see {trainer.log}",
        )
    everywhere = len({each.what if each else None for _, each in failures}) == 1 < len(failures)
    if own and several and not everywhere:
        failure.what = f"rank {trainer.rank}: {failure.what}"
    elif unfinished and f"rank {unfinished[0]}" not in failure.found:
        names = ", ".join(map(str, unfinished))
        failure.found += f"; rank {names} was still running, see its log.rankN.txt"
    # A trainer does not know of --force, with which the same command would start over.
    fix = failure.fix.replace("the same command", stage.same_command)
    return type(failure)(failure.what, failure.expected, failure.found, fix)


def _failure_of(stage: Stage, trainer: _Trainer) -> StageError | None:
    failure = read_failure(stage.dir, trainer.rank)
    if failure is None and trainer.timed_out:  # NCCL's watchdog ended the process
        return TrainerEnded(
            f"rank {trainer.rank} could not finish the exchange with the other ranks over NCCL",
            "every rank to reach the same exchange within the timeout",
            "NCCL's watchdog ended the rank",
            f"see {trainer.log}",
            consequence=True,
        )
    return failure


def _environment() -> dict[str, str]:
    """Return the trainer's environment, which is offline.

    The hub is not needed, because all files are local by now. Everything else is as in the stage's
    own process, even if the stage was called by another program (`registration.add_defaults`).
    """
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8:backslashreplace",  # as the reader of its output expects
        "HF_HUB_OFFLINE": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",
    }
    add_defaults(environment)
    # Axolotl would set this variable if it were missing, ignoring the old name.
    if old := environment.get("PYTORCH_CUDA_ALLOC_CONF"):
        environment.setdefault("PYTORCH_ALLOC_CONF", old)
    return environment


def die_with_parent() -> None:
    """Ask the kernel, in the child before exec, to kill it when its parent dies (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _tell_end(code: int, last: list[str]) -> list[str]:
    """Return a trainer's last lines under a line that introduces them."""
    hint = "killed from outside, as Linux does when memory runs out; "
    words = "its last lines were:" if last else "it wrote nothing that tells the cause"
    return [f"{hint * (code == -signal.SIGKILL)}{words}", *last]


def _name(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
