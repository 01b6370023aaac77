"""Hashes of what stage 02 has finished, so that no file changes while it is interrupted.

Each layer's record holds the rows of its files, and the model's record those of all its files. They
are compared when the work is continued and before it is published; files whose size and time are
the same are not read again, neither here nor for the manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from sparselong.errors import StageError
from sparselong.files import read_json
from sparselong.provenance import are_rows, describe_files, refuse_changes
from sparselong.run import Stage

_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("files", "stored", "masters"), are_rows),
    "seconds": lambda value: all(
        isinstance(each, int | float)
        for each in (value.values() if isinstance(value, dict) else [value])
    ),
}
"""What keys of any record hold: rows of `describe_files`; seconds, or seconds by part."""


def read_own(path: Path, *keys: str) -> dict[str, Any]:
    """Return the JSON object with these keys that this stage wrote.

    Raises:
        StageError: it cannot be read, or lacks a key.
    """
    again = "restore the file, or redo the stage: python 02_compress.py --force"
    document = read_json(path, again)
    lacking = [
        key
        for key in keys
        if key not in document or (key in _CHECKS and not _CHECKS[key](document[key]))
    ]
    if lacking:
        raise StageError(
            f"{path} is damaged", f"{', '.join(keys)}", f"no valid {', '.join(lacking)}", again
        )
    return document


def describe_finished(stage: Stage, folder: Path, paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Return rows of `describe_files` for files in a folder that may be renamed.

    Args:
        stage: the running stage; its `described` files need not be read again.
        folder: the rows' paths are relative to it.
        paths: files and folders in it.
    """
    return describe_files(paths, folder, _absolute(stage.run_dir, stage.described))


def check_finished(stage: Stage, folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Raise unless files are as they were described, and note them as described.

    Raises:
        StageError: a file was changed or removed since.
    """
    rows = list(rows)
    refuse_changes(rows, folder, stage.name)
    stage.described += _absolute(folder, rows)


def _absolute(folder: Path, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "path": str((folder / row["path"]).absolute())} for row in rows]
