"""End every rank when one fails, with a message that names the failed rank and the cause.

The backends' own errors do not name it: gloo names an address; NCCL waits for its timeout (with the
main thread inside a CUDA call that no exception can interrupt) and then aborts with a page of text.
Inside `watch_ranks`, a thread of every rank therefore writes a heartbeat with its number of begun
exchanges to the rendezvous store, and reads the other ranks' heartbeats. It detects:

| event                                                  | who is named                            |
|--------------------------------------------------------|-----------------------------------------|
| a rank's block ended with an exception                 | that rank, with the exception           |
| a rank's heartbeat stopped (process or machine gone)   | that rank                               |
| no exchange was begun for `timeout_seconds`, and some  | a rank that has begun the fewest        |
| ranks have begun fewer than others                     |                                         |
| the store is gone                                      | rank 0, or the launcher that held it    |

The first failure in the store wins. A rank whose exchange failed raises it as a StageError; a rank
that is still stuck after two beats prints the same four lines and exits with code 1. Nothing here
touches files, so checkpoints stay intact.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from sparselong.errors import StageError
from sparselong.parallel import ExchangeError, progress

_FAILURE = "failure"
_blocks = 0
_current: _Watch | None = None


@contextmanager
def watch_ranks(
    timeout_seconds: float,
    silence_seconds: float = 30.0,
    beat_seconds: float = 1.0,
    tell: Callable[[StageError], None] | None = None,
) -> Iterator[None]:
    """End this rank when another one fails, with a message that names the cause.

    Every rank must enter the block the same number of times. The backend's own timeout (see
    `build_mesh`) should be longer than `timeout_seconds`.

    Args:
        timeout_seconds: how long ranks may differ in their number of begun exchanges.
        silence_seconds: how long a heartbeat may be missing before its rank counts as gone.
        beat_seconds: interval between heartbeats.
        tell: also called with the failure before a stuck rank exits.

    Raises:
        StageError: another rank failed; the message names it and the cause.
    """
    global _blocks, _current
    _blocks += 1
    name = f"sparselong/{_blocks}"
    watch = _current = _Watch(name, timeout_seconds, silence_seconds, beat_seconds, tell)
    watch.thread.start()
    try:
        yield
    except BaseException as error:
        if not _is_consequence(error):
            watch.tell_others(error)
            raise
        raise watch.explain(watch.await_failure(error)) from error
    finally:
        _current = None
        watch.stop()


def end_other_ranks(error: BaseException) -> None:
    """End the other ranks inside their `watch_ranks` blocks, while this rank's block continues.

    For a failure that the block may catch: the others would wait for this rank. What only reports
    that another rank failed is not told. Outside of a block nobody is told.

    Args:
        error: this rank's failure, the cause that the others name.
    """
    if _current is not None and not _is_consequence(error):
        _current.tell_others(error)


def report_end(rank: int) -> None:
    """Report that a rank's process has ended, before the lack of its heartbeat tells."""
    if _current is not None:
        _current.report(rank, "its process has ended")


class _Watch:
    """One rank's view of all ranks."""

    def __init__(
        self,
        prefix: str,
        timeout: float,
        silence: float,
        beat: float,
        tell: Callable[[StageError], None] | None,
    ):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.timeout, self.silence, self.beat, self.tell = timeout, silence, beat, tell
        # A separate connection, because the main thread may block on the default one.
        store = dist.distributed_c10d._get_default_store().clone()
        self.store = dist.distributed_c10d.PrefixStore(prefix, store)
        self.stopped = threading.Event()
        self.raised = False  # in this rank's own block: it then exits by itself, or continues
        self.failure: dict[str, Any] | None = None
        self.seen: dict[int, tuple[str, float]] = {}
        self.counts: tuple[tuple[int, ...], float] = ((), time.monotonic())
        self.before, _ = progress()  # in an earlier block ranks may differ
        self.thread = threading.Thread(target=self._run, name="watch_ranks", daemon=True)

    def stop(self) -> None:
        """End the thread, and tell the other ranks to expect no more heartbeats."""
        self.stopped.set()
        self.thread.join()
        try:
            self.store.set(f"{self.rank}", json.dumps({"done": True}))
        except dist.DistError:  # the store's host has already ended
            return

    def tell_others(self, error: BaseException) -> None:
        """Report a failure of this rank, which deals with it itself."""
        self.raised = True
        self.report(self.rank, f"{type(error).__name__}: {_first_line(error)}")

    def report(self, rank: int, cause: str) -> None:
        """Write a failure unless the store has one already, and keep the one in the store."""
        mine = json.dumps({"rank": rank, "cause": cause})
        try:
            self.failure = json.loads(self.store.compare_set(_FAILURE, "", mine))
        except dist.DistError as error:
            self.failure = {
                "rank": 0,
                "cause": f"the rendezvous store is gone: {_first_line(error)}",
            }

    def await_failure(self, error: BaseException) -> dict[str, Any]:
        """Return the failure behind a failed exchange, or the exchange's own after a wait."""
        deadline = time.monotonic() + self.silence + 5 * self.beat
        while self.failure is None and time.monotonic() < deadline:
            time.sleep(self.beat / 4)
        if self.failure is None:
            self.report(self.rank, _first_line(error))
        assert self.failure is not None
        return self.failure

    def explain(self, failure: dict[str, Any]) -> StageError:
        """Return another rank's failure as this rank's error."""
        return StageError(
            f"rank {self.rank} stops because rank {failure['rank']} of {self.size} failed",
            "every rank to run to the end",
            f"rank {failure['rank']}: {failure['cause']}",
            "fix the cause named here, then run the same command again",
            consequence=True,
        )

    def _run(self) -> None:
        beats, noticed = 0, None
        while not self.stopped.wait(self.beat):
            beats += 1
            try:
                self._look(beats)
            except dist.DistError as error:
                cause = f"it, or the launcher that held the rendezvous, is gone ({error})"
                self.failure = self.failure or {"rank": 0, "cause": cause.split("\n")[0][:200]}
            if self.failure is None:
                continue
            noticed = noticed or time.monotonic()
            if not self.raised and time.monotonic() - noticed > 2 * self.beat:
                explained = self.explain(self.failure)
                print(explained, file=sys.stderr, flush=True)
                if self.tell is not None:
                    self.tell(explained)
                os._exit(1)

    def _look(self, beats: int) -> None:
        begun, tag = progress()
        mine = {"beat": beats, "begun": begun - self.before, "tag": tag}
        self.store.set(f"{self.rank}", json.dumps(mine))
        if self.store.check([_FAILURE]):
            self.failure = json.loads(self.store.get(_FAILURE))
            return
        now, states = time.monotonic(), {}
        for rank in range(self.size):
            text = self.store.get(f"{rank}").decode() if self.store.check([f"{rank}"]) else ""
            if text != self.seen.get(rank, (None, 0))[0]:
                self.seen[rank] = (text, now)
            states[rank] = json.loads(text) if text else {}
            silent = now - self.seen[rank][1]
            if silent > self.silence and not states[rank].get("done"):
                self.report(rank, f"no heartbeat for {silent:.0f} s: killed, or unreachable")
                return
        self._compare({rank: state for rank, state in states.items() if "begun" in state}, now)

    def _compare(self, states: dict[int, dict[str, Any]], now: float) -> None:
        """Report the slowest rank if others have waited too long for it."""
        counts = tuple(state["begun"] for state in states.values())
        if counts != self.counts[0]:
            self.counts = (counts, now)
        if len(set(counts)) < 2 or now - self.counts[1] < self.timeout:
            return
        late = min(states, key=lambda rank: states[rank]["begun"])
        first = max(states.values(), key=lambda state: state["begun"])
        cause = (
            f"timeout: {self.timeout:.0f} s after exchange {states[late]['begun']} "
            f"('{states[late]['tag']}') it had not begun the next; others wait in exchange "
            f"{first['begun']} ('{first['tag']}')"
        )
        self.report(late, cause)


def _is_consequence(error: BaseException) -> bool:
    """Return whether an exception only reports that another rank is gone."""
    return isinstance(error, ExchangeError | dist.DistError)


def _first_line(error: BaseException) -> str:
    found = getattr(error, "found", None) or str(error)
    return found.strip().split("\n")[0][:300]
