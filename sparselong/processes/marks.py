"""Marked lines in which a trainer or rank tells the stage's process what to show.

The stage reads its processes' output (process.py). It shows lines that begin with MARK, and takes
those that begin with PROGRESS as reports of how far the work is. Everything else goes to log.txt
alone.
"""

from __future__ import annotations

import json

from sparselong.run import Stage

MARK = "[sparselong] "
PROGRESS = "[sparselong progress] "


def tell(text: str) -> None:
    """Print lines for the stage's process to show."""
    for line in text.splitlines() or [""]:
        print(f"{MARK}{line}", flush=True)


def report_progress(what: str, done: int, total: int, note: str = "") -> None:
    """Print how far the work is, for the stage's display; see `Display.show`."""
    print(f"{PROGRESS}{json.dumps([what, done, total, note])}", flush=True)


def pass_on(line: str, stage: Stage) -> None:
    """Give the stage what `report_progress` printed."""
    what, done, total, note = json.loads(line.removeprefix(PROGRESS))
    stage.report(what, done, total, note)
