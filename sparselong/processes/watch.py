"""When one rank ends, all end, and each says which one it was and why.

A backend's own errors do not: gloo names an address, NCCL waits for its time-out (with the main
thread deep in a CUDA call that no exception reaches) and then aborts with a page of text. So inside
`watch_ranks` a thread of every rank writes to the rendezvous store, once a beat, that it is alive
and how many exchanges it has begun, and reads the others'. What it notices:

| what                                                   | who is named                            |
|--------------------------------------------------------|-----------------------------------------|
| a rank's block ended with an exception                 | that rank, with the exception           |
| a rank writes no more (killed, or its machine is gone) | that rank                               |
| no exchange was begun for `timeout_seconds`, some      | the ranks that have begun the fewest    |
| ranks having begun fewer than others                   |                                         |
| the store itself is gone                               | rank 0, or the launcher that held it    |

The first failure written counts. A rank whose exchange failed meanwhile raises StageError with it;
one that is still stuck after two beats prints the same four lines and ends with exit code 1. What a
checkpoint wrote stays as it was: nothing here touches files.
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


@contextmanager
def watch_ranks(
    timeout_seconds: float,
    silence_seconds: float = 30.0,
    beat_seconds: float = 1.0,
    tell: Callable[[StageError], None] | None = None,
) -> Iterator[None]:
    """Ends this rank, with a message that names the cause, when another one fails.

    Every rank must enter it, equally often. Where the backend has a time-out of its own (see
    `build_mesh`), it should be the longer one.

    Args:
        timeout_seconds: how long ranks may be apart in the exchanges that they have begun.
        silence_seconds: how long a rank may write nothing before it counts as gone.
        beat_seconds: between two looks.
        tell: is given the failure, too, before a stuck rank is ended.

    Raises:
        StageError: another rank failed; names it and its cause.
    """
    global _blocks
    _blocks += 1
    name = f"sparselong/{_blocks}"
    watch = _Watch(name, timeout_seconds, silence_seconds, beat_seconds, tell)
    watch.thread.start()
    try:
        yield
    except BaseException as error:
        if not _is_consequence(error):
            watch.raised = True
            watch.report(watch.rank, f"{type(error).__name__}: {_first_line(error)}")
            raise
        raise watch.explain(watch.await_failure(error)) from error
    finally:
        watch.stop()


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
        # A connection of its own: the main thread may wait in the other one.
        store = dist.distributed_c10d._get_default_store().clone()
        self.store = dist.distributed_c10d.PrefixStore(prefix, store)
        self.stopped = threading.Event()
        self.raised = False  # this rank's own failure: it ends by itself, in the time it needs
        self.failure: dict[str, Any] | None = None
        self.seen: dict[int, tuple[str, float]] = {}
        self.counts: tuple[tuple[int, ...], float] = ((), time.monotonic())
        self.thread = threading.Thread(target=self._run, name="watch_ranks", daemon=True)

    def stop(self) -> None:
        """Ends the thread; other ranks do not miss this one from now on."""
        self.stopped.set()
        self.thread.join()
        try:
            self.store.set(f"{self.rank}", json.dumps({"done": True}))
        except dist.DistError:  # whoever held the store has ended before
            return

    def report(self, rank: int, cause: str) -> None:
        """Writes down a failure, unless there is one already, and keeps the one that counts."""
        mine = json.dumps({"rank": rank, "cause": cause})
        try:
            self.failure = json.loads(self.store.compare_set(_FAILURE, "", mine))
        except dist.DistError as error:
            self.failure = {"rank": 0, "cause": f"the rendezvous is gone: {_first_line(error)}"}

    def await_failure(self, error: BaseException) -> dict[str, Any]:
        """The failure behind a failed exchange; the exchange itself if none is found in time."""
        deadline = time.monotonic() + self.silence + 5 * self.beat
        while self.failure is None and time.monotonic() < deadline:
            time.sleep(self.beat / 4)
        if self.failure is None:
            self.report(self.rank, _first_line(error))
        assert self.failure is not None
        return self.failure

    def explain(self, failure: dict[str, Any]) -> StageError:
        """What this rank has to say."""
        return StageError(
            f"rank {self.rank} ends, since rank {failure['rank']} of {self.size} has failed",
            "every rank to go on to the end",
            f"rank {failure['rank']}: {failure['cause']}",
            "mend the cause named here and start again: training goes on from the last checkpoint",
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
                told = self.explain(self.failure)
                print(told, file=sys.stderr, flush=True)
                if self.tell is not None:
                    self.tell(told)
                os._exit(1)

    def _look(self, beats: int) -> None:
        begun, tag = progress()
        mine = {"beat": beats, "begun": begun, "tag": tag}
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
                self.report(
                    rank, f"has not been heard of for {silent:.0f} s: killed, or unreachable"
                )
                return
        self._compare({rank: state for rank, state in states.items() if "begun" in state}, now)

    def _compare(self, states: dict[int, dict[str, Any]], now: float) -> None:
        """Whether some ranks have been waiting for others for too long."""
        counts = tuple(state["begun"] for state in states.values())
        if counts != self.counts[0]:
            self.counts = (counts, now)
        if len(set(counts)) < 2 or now - self.counts[1] < self.timeout:
            return
        late = min(states, key=lambda rank: states[rank]["begun"])
        first = max(states.values(), key=lambda state: state["begun"])
        cause = (
            f"time-out: {self.timeout:.0f} s after exchange {states[late]['begun']} "
            f"('{states[late]['tag']}') it had not come to the next; others wait in exchange "
            f"{first['begun']} ('{first['tag']}')"
        )
        self.report(late, cause)


def _is_consequence(error: BaseException) -> bool:
    """Return whether an exception only says that another rank is gone."""
    return isinstance(error, ExchangeError | dist.DistError)


def _first_line(error: BaseException) -> str:
    found = getattr(error, "found", None) or str(error)
    return found.strip().split("\n")[0][:300]
