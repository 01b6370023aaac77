"""Reading and showing manifests: results of finished stages and parts, whole, of this version."""

from __future__ import annotations

import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

from sparselong.errors import StageError
from sparselong.figures import format_figure, format_seconds
from sparselong.run.place import MANIFEST, check_manifest, read_document, redo_recorded

FORMAT_VERSION = 3
"""Of manifests and of what their hashes cover; 1 hashed keys that decide no result too, 2 had no
date."""


class MissingStage(StageError):
    """A stage that is not done in a run directory, and that another one reads."""

    def __init__(self, reader: str, name: str, run_dir: Path):
        super().__init__(
            f"{reader} needs {name}, which is not done in {run_dir}",
            f"{run_dir / name / MANIFEST}",
            "no manifest",
            f"run python {name}.py first",
        )


def read_manifest(run_dir: Path, name: str, part: str = "") -> dict[str, Any] | None:
    """Return the manifest of a stage or part, or None if it is not done.

    Args:
        run_dir: the run directory.
        name: the stage.
        part: the part of it, if the stage has parts.

    Raises:
        StageError: it cannot be read, is damaged, or is of another version.
    """
    folder = run_dir / name / part
    manifest = read_document(folder / MANIFEST)
    if manifest is not None:
        refuse_other_version(folder, manifest)
        check_manifest(folder / MANIFEST, name, manifest)
    return manifest


def hash_outputs(manifest: dict[str, Any]) -> str:
    """Return a hash of what a finished stage made.

    It stays the same if the stage is redone and produces the same bytes, so it does not cover the
    files' times.
    """
    rows = [{k: v for k, v in row.items() if k != "mtime_ns"} for row in manifest["outputs"]]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def refuse_other_version(directory: Path, found: dict[str, Any]) -> None:
    """Raise if a stage's directory was written by a version with another format."""
    version = found.get("format_version", 1)
    if version != FORMAT_VERSION:
        raise StageError(
            f"{directory} was written by another version of Sparse-Long",
            f"format version {FORMAT_VERSION}",
            f"format version {version}",
            f"use another --run-dir, or redo it: {redo_recorded(directory)}",
        )


def show_manifest(manifest: dict[str, Any], done_at: float | None = None) -> str:
    """Return a summary of a finished stage: its duration and the scalar metrics that it has.

    Args:
        manifest: the stage's.
        done_at: when that was, in seconds since 1970, if it was done before this command.
    """
    title = " ".join(filter(None, (manifest["stage"], manifest.get("part"))))
    status = manifest["status"]
    if done_at is not None:
        when = datetime.datetime.fromtimestamp(done_at).astimezone().strftime("%Y-%m-%d %H:%M")
        status = f"was {status} on {when},"
    rows = [f"{title} {status} in {format_seconds(manifest['seconds'])}"]
    for key, value in manifest["metrics"].items():
        inner = value if isinstance(value, dict) else {}
        if inner and not any(isinstance(v, (dict, list)) for v in inner.values()):
            unit, known = "_bytes" if "bytes" in key.split("_") else "", inner.items()
            known = (f"{k} {format_figure(f'{k}{unit}', v)}" for k, v in known if v is not None)
            rows.append(f"  {key}: {', '.join(known)}")
        elif value is not None and not isinstance(value, (dict, list)):
            rows.append(f"  {key}: {format_figure(key, value)}")
    return "\n".join(rows)
