"""For how long a stage has computed, over all its sessions, and what that cost.

`spent.json` in the stage's directory has a row for each session: the number and the name of its
GPUs, when it began, and for how long it has computed. The time is noted while the stage works, so
that little is missing of a session that was killed.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from sparselong.config import Config
from sparselong.files import read_json, write_atomically

_SPENT = "spent.json"


def begin_session(folder: Path, gpus: int) -> None:
    """Begin a session of a stage.

    Args:
        folder: the stage's directory.
        gpus: number of GPUs that compute; 0 for a processor.

    Raises:
        StageError: the file about earlier sessions cannot be read.
    """
    session = {"gpus": gpus, "gpu": None, "began": time.time(), "seconds": 0.0}
    _write(folder, [*_read(folder), session])


def note_session(folder: Path, gpu: str | None = None) -> None:
    """Note that the session in progress, if any, has lasted until now.

    Args:
        folder: the stage's directory.
        gpu: the driver's name of its GPUs, once it is known.

    Raises:
        StageError: the file about the sessions cannot be read.
    """
    sessions = _read(folder)
    if not sessions:
        return
    *earlier, session = sessions
    session["seconds"] = time.time() - session["began"]
    session["gpu"] = gpu or session["gpu"]
    _write(folder, [*earlier, session])


def sum_sessions(folder: Path, config: Config) -> dict[str, float | None]:
    """Return `gpu_hours` and `cost` of all sessions.

    The cost is None without GPUs, or if the config has no price for those of a session.
    """
    sessions = [row for row in _read(folder) if row["gpus"]]
    hours = [row["gpus"] * row["seconds"] / 3600 for row in sessions]
    prices = [config.cost.price(row["gpu"] or "") for row in sessions]
    costs = [price * hour for price, hour in zip(prices, hours, strict=True) if price is not None]
    is_known = bool(costs) and len(costs) == len(sessions)
    return {"gpu_hours": sum(hours), "cost": sum(costs) if is_known else None}


def _read(folder: Path) -> list[dict[str, Any]]:
    path = folder / _SPENT
    fix = f"remove {path}: the manifest's GPU hours then begin with the next session"
    return read_json(path, fix)["sessions"] if path.exists() else []


def _write(folder: Path, sessions: list[dict[str, Any]]) -> None:
    write_atomically(folder / _SPENT, json.dumps({"sessions": sessions}) + "\n")
