"""The one progress display of every stage: a live bar on a terminal, otherwise a line now and then.

A stage says what it counts, how far it is and what else is worth knowing (`Display.show`). On a
terminal that is a bar with the time left, and messages are printed above it. Anywhere else, and in
log.txt, it is plain lines: one in LINE_SECONDS for each thing that is counted, and one at the end
of what took longer. rich is imported for a terminal alone, and draws the bar once a second in its
own thread.

Trainers and ranks are processes of their own: what they report reaches the stage through
processes/marks.py. What a display writes to a terminal that is gone is dropped
(registration.set_streams).
"""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from sparselong.figures import format_seconds

LINE_SECONDS = 10.0
_REDRAWS_PER_SECOND = 1
_PLAIN = ("dumb", "unknown")
"""Terminals whose cursor cannot be moved, by TERM."""


@dataclass
class _Count:
    """What is known of one thing that is counted.

    Attributes:
        first: how many were done when it was first reported; a resumed run begins in the middle.
        since: when that was.
        told: when a line was last due, at first as `since`.
        task: rich's number of the bar; None without one.
    """

    first: int
    since: float
    told: float
    task: Any = None


class Display:
    """A stage's progress; inside a `with` block a terminal has a live bar."""

    def __init__(self) -> None:
        self._counts: dict[str, _Count] = {}
        self._is_live = False
        self._bar: Any = None  # only while something is counted
        self._lock = threading.RLock()  # the threads that read trainers' output report as well

    def __enter__(self) -> Display:
        # At a width of 0, which some editors' shells set, rich would print nothing at all.
        can_draw = os.environ.get("TERM") not in _PLAIN and os.environ.get("COLUMNS") != "0"
        self._is_live = sys.stderr.isatty() and can_draw
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_live = False
        self._counts.clear()
        self._end_bar()

    def print(self, message: str) -> None:
        """Print a message to stderr, above the bar if there is one."""
        bar = self._bar
        if bar is None:
            print(message, file=sys.stderr, flush=True)
        else:
            bar.console.print(message, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def show(self, what: str, done: int, total: int, note: str = "") -> str | None:
        """Show that `done` of `total` are done.

        Args:
            what: what is counted, such as `layer`.
            done: how many are done, between 0 and `total`; the first report, which starts the
                clock, has what was done before.
            total: how many there are.
            note: what else is worth knowing, as a person reads it.

        Returns:
            The line for a log if one is due, else None; without a bar it has been printed.
        """
        with self._lock:
            now = time.monotonic()
            count = self._counts.get(what)
            if count is None or done < count.first:  # counted again, as for the next model
                count = self._counts[what] = _Count(done, now, now, count and count.task)
            left = _seconds_left(count, done, total, now)
            rest = "" if left is None or done >= total else f"{format_seconds(left)} left"
            if self._is_live:
                self._draw(count, what, done, total, note, rest)
            if done >= total:
                del self._counts[what]
                if not self._counts:
                    self._end_bar()
            if now - (count.since if done >= total else count.told) < LINE_SECONDS:
                return None
            count.told = now
        line = f"{what} {done:,}/{total:,}" + "".join(f", {each}" for each in (note, rest) if each)
        if not self._is_live:
            print(line, file=sys.stderr, flush=True)
        return line

    def _draw(self, count: _Count, what: str, done: int, total: int, note: str, left: str) -> None:
        if self._bar is None:
            self._bar = _start_bar()
        figures: dict[str, Any] = {"completed": done, "total": total, "note": note, "left": left}
        if count.task is None:
            count.task = self._bar.add_task(what, **figures)
        self._bar.update(count.task, **figures)
        if done >= total:
            self._bar.remove_task(count.task)

    def _end_bar(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.stop()


def _seconds_left(count: _Count, done: int, total: int, now: float) -> float | None:
    """Return the time until all are done, at the pace so far; None before there is one."""
    if done <= count.first:
        return None
    return (now - count.since) / (done - count.first) * (total - done)


def _start_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Column

    whole, rest = Column(no_wrap=True), Column(ratio=1)  # a narrow terminal folds the note
    bar = Progress(
        TextColumn("{task.description}", markup=False, table_column=whole),
        BarColumn(bar_width=12, table_column=whole),
        MofNCompleteColumn(table_column=whole),
        TextColumn("{task.fields[left]}", markup=False, table_column=whole),
        TextColumn("{task.fields[note]}", markup=False, table_column=rest),
        console=Console(file=sys.stderr, markup=False, highlight=False, emoji=False),
        refresh_per_second=_REDRAWS_PER_SECOND,
        redirect_stdout=False,
        transient=True,
        expand=True,
    )
    bar.start()
    return bar
