"""Work as rank 0 in the stage's own process, beside the other ranks.

Elsewhere all ranks are children of the stage's process (process.py). A stage that talks with a
person, or answers requests, does so on rank 0: its process has the terminal, and takes part in the
work. The other ranks are its children, or those of torchrun's other processes; they have no stdin
and a session of their own, so that Ctrl-C reaches this process alone.

When another rank fails, this process gets SIGTERM, which ends whatever it waits for: input, a
request or an exchange. The failure is then raised in place of what the signal raised.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sparselong.errors import ExpectedError, StageError
from sparselong.processes.follow import leading_together
from sparselong.processes.launch import World, hide_launcher, joined_rank, rank_environments
from sparselong.processes.process import Beside, run_trainer
from sparselong.processes.watch import report_end
from sparselong.run import Stage

_GRACE_SECONDS = 10.0
_OWN = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
"""Variables of a rank that this process does not take over: its libraries have read them."""


@contextmanager
def working_beside(stage: Stage, arguments: Sequence[str], size: int) -> Iterator[None]:
    """Make this process rank 0 of several in the block, at whose end the others have ended.

    `interruptible` must be around it. The block joins the others, and leaves them.

    Args:
        stage: the running stage, whose directory takes the other ranks' output.
        arguments: the Python arguments that run another rank.
        size: number of processes.

    Raises:
        StageError: another rank failed, which the message names.
    """
    if joined_rank() is not None:
        with leading_together(stage):
            yield
        return
    import torch

    world = World(size, {rank: rank for rank in range(size)}, size, joined=False)
    environments = rank_environments(world, torch.cuda.device_count())
    own, threads = environments.pop(0), torch.get_num_threads()
    os.environ |= {name: value for name, value in own.items() if name not in _OWN}
    others = _Others(stage, [sys.executable, *arguments], environments)
    try:
        torch.set_num_threads(int(own.get("OMP_NUM_THREADS", threads)))
        others.start()
        yield
    except BaseException as error:
        others.end()
        if others.failure is not None and others.explain(error):
            raise others.failure from error
        raise
    finally:
        others.end()
        hide_launcher()  # if the block failed before it joined the others
        torch.set_num_threads(threads)
    if others.failure is not None:
        raise others.failure


class _Others:
    """The other ranks, and a thread that waits for them."""

    def __init__(self, stage: Stage, command: list[str], environments: dict[int, dict[str, str]]):
        self._start = (stage, command, environments)
        self._started, self._ended, self._has_told = threading.Event(), threading.Event(), False
        self.failure: Exception | None = None
        self._failed_to_start: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="other ranks", daemon=True)

    def start(self) -> None:
        """Start them.

        Raises:
            OSError: that is not possible.
        """
        self._thread.start()
        # A child that is forked while another thread loads a library may find the loader half-way.
        self._started.wait()
        if self._failed_to_start is not None:
            raise self._failed_to_start

    def end(self) -> None:
        """Wait until the other ranks have ended; those that do not are stopped."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def explain(self, error: BaseException) -> bool:
        """Return whether their failure is why the block ended with an error."""
        failure = self.failure
        if isinstance(failure, ExpectedError) and failure.consequence:
            return False
        if isinstance(error, KeyboardInterrupt):
            return self._has_told
        return isinstance(error, ExpectedError) and error.consequence

    def _run(self) -> None:
        try:
            run_trainer(*self._start, Beside(self._started, self._ended, self._tell))
        except Exception as error:
            if not self._started.is_set():
                self._failed_to_start = error
                self._started.set()
                return
            self.failure = error  # raised at the block's end
        if self.failure is None or self._ended.is_set():
            return
        self._tell()
        if not self._ended.wait(_GRACE_SECONDS):  # it waits where no signal reaches it
            print(self.failure, file=sys.stderr, flush=True)
            os._exit(StageError.exit_code)

    def _tell(self, rank: int | None = None) -> None:
        """End what this process waits for."""
        if self._has_told:
            return
        self._has_told = True
        if rank is not None:
            report_end(rank)
        os.kill(os.getpid(), signal.SIGTERM)
