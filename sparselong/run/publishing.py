"""Writing the page about a run whenever a stage is done, without harm to the stage."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sparselong.errors import ExpectedError
from sparselong.run.directory import Stage

Publish = Callable[[Path], Path]
"""Writes a page about every finished stage of a run directory, and returns its path."""


def publish(stage: Stage, write: Publish | None) -> None:
    """Write the page about a run, and say where it is or why it could not be written.

    The stage is done and its manifest is written: whatever goes wrong here does not end it.
    """
    if write is None:
        return
    try:
        told = f"all finished stages on one page: {write(stage.run_dir)}"
    except ExpectedError as error:
        told = f"warning: {stage.name} is done, but the page about the run is not:\n{error}"
    except Exception:
        what = f"{stage.name} is done, but the page about the run could not be written"
        told = f"warning: {what}, by a fault in it:\n{traceback.format_exc().rstrip()}"
    with suppress(OSError):  # a full disk: the line has been printed before it is logged
        stage.log(told)
