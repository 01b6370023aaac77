"""Checkpoint directories on disk: which are ours, which are whole, which may be removed.

    checkpoints/checkpoint-N/            a checkpoint, with whole.json
    checkpoints/.unfinished/             being written or removed; deleted at the next start
    checkpoints/checkpoint-N.set-aside   what stood in the place of a new checkpoint

Training writes a checkpoint under `.unfinished`, adds whole.json with size and sha256 of every file
(`seal`), and renames the directory (`publish`), so that a directory named checkpoint-N was complete
once. Disks fill up and people copy, cut and edit files; therefore `find_fault` compares the files
with whole.json before training reads them. Checkpoints of earlier versions have no whole.json;
their files are opened instead.

Only directories that are named exactly checkpoint-N are read, and only those that still hold
exactly what training wrote are removed. Everything else in the folder is the user's.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Mapping, Set
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sparselong.files import load_json, write_atomically
from sparselong.provenance import hash_file

RECORD = "whole.json"
UNFINISHED = ".unfinished"
TRAINER_STATE = "trainer_state.json"
MASKS = "masks.safetensors"
PROGRESS = "progress.json"
OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_NEEDED = (
    *("adapter_config.json", "adapter_model.safetensors", MASKS, PROGRESS),
    *(OPTIMIZER, SCHEDULER, "rng_state.pth", TRAINER_STATE),
)
_OPENED = (*_NEEDED, "rng_state_*.pth", "scaler.pt", "tokens_state.json")
_FOR_READERS = "README.md"
"""PEFT's description of the adapter, which people edit and training does not read."""
_DAMAGE = (
    *(ValueError, SafetensorError, EOFError),
    *(zipfile.BadZipFile, zlib.error, struct.error, RuntimeError),  # RuntimeError: encrypted
)


def step_of(path: Path) -> int | None:
    """Return N of a path named exactly `checkpoint-N`, else None."""
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else None


def numbered(folder: Path) -> dict[int, Path]:
    """Return what is named exactly `checkpoint-N` in a folder, by ascending N."""
    paths = folder.iterdir() if folder.is_dir() else ()
    found = {step: path for path in paths if (step := step_of(path)) is not None}
    return dict(sorted(found.items()))


def find_last(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """Find the checkpoint from which training can continue.

    Returns:
        The whole checkpoint with the highest step, None if there is none; and what is wrong with
        each one of a higher step.
    """
    faults = {}
    for path in reversed(numbered(folder).values()):
        fault = find_fault(path)
        if fault is None:
            return path, faults
        faults[path] = fault
    return None, faults


def find_best(folder: Path, losses: Mapping[int, float]) -> Path | None:
    """Return the whole checkpoint with the lowest finite loss.

    Args:
        folder: the folder of the checkpoints.
        losses: validation loss by step.
    """
    for step in sorted((s for s in losses if math.isfinite(losses[s])), key=lambda s: losses[s]):
        path = folder / f"checkpoint-{step}"
        if find_fault(path) is None:
            return path
    return None


def find_fault(checkpoint: Path) -> str | None:
    """Return why training cannot continue from a path, or None if it is a whole checkpoint."""
    if step_of(checkpoint) is None:
        return "it is not named checkpoint-N"
    if checkpoint.is_symlink():
        return "it is a symbolic link, which training does not write"
    if not checkpoint.is_dir():
        return "it is not a directory" if checkpoint.exists() else "it does not exist"
    try:
        for name in _NEEDED:
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
        fault = _compare(checkpoint) if (checkpoint / RECORD).exists() else _open_all(checkpoint)
        return fault or _check_step(checkpoint)
    except OSError as error:
        return f"{Path(error.filename or checkpoint).name}: {error.strerror or error}"


def _compare(checkpoint: Path) -> str | None:
    """Return how the files differ from whole.json."""
    files = _read_record(checkpoint)
    if files is None:
        return f"{RECORD} is damaged"
    read = [name for name in files if name != _FOR_READERS]
    for name in _NEEDED:
        if name not in read:
            return f"{RECORD} does not list {name}"
    for name in read:
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        size, wanted = (checkpoint / name).stat().st_size, files[name]["bytes"]
        if size != wanted:
            return f"{name} has {size:,} bytes instead of {wanted:,}"
    for name in read:
        if hash_file(checkpoint / name) != files[name]["sha256"]:
            return f"{name} is not what was written (its sha256 differs)"
    return None


def _read_record(checkpoint: Path) -> dict[str, dict[str, Any]] | None:
    """Return bytes and sha256 of every file by whole.json; None if it is no such record."""
    try:
        files = load_json(checkpoint / RECORD)["files"]
        return {
            str(name): {"bytes": int(one["bytes"]), "sha256": str(one["sha256"])}
            for name, one in files.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _open_all(checkpoint: Path) -> str | None:
    """Return which file of a checkpoint without whole.json cannot be opened."""
    for path in sorted(checkpoint.iterdir()):
        if not any(fnmatch(path.name, pattern) for pattern in _OPENED):
            continue
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="numpy"):
                    continue
            if path.suffix == ".json":
                load_json(path)
                continue
            with zipfile.ZipFile(path) as archive:  # torch.save's format
                if archive.testzip() is not None:
                    return f"{path.name} is damaged: a checksum differs"
        except _DAMAGE as error:
            return f"{path.name} is damaged: {error}"
    return None


def _check_step(checkpoint: Path) -> str | None:
    step = _read_step(checkpoint)
    if step is None:
        return f"{TRAINER_STATE} is damaged"
    if step != step_of(checkpoint):
        return f"{TRAINER_STATE} is of step {step}"
    return None


def _read_step(checkpoint: Path) -> Any:
    """Return the step at which a checkpoint was written; None if it does not say."""
    try:
        return load_json(checkpoint / TRAINER_STATE)["global_step"]
    except (OSError, ValueError, KeyError):
        return None


def begin(folder: Path) -> Path:
    """Return the empty directory in which a checkpoint is written; remove what a kill left."""
    clean(folder)
    made = folder / UNFINISHED
    made.mkdir(parents=True)
    return made


def clean(folder: Path) -> None:
    """Remove a checkpoint whose writing or removal was interrupted."""
    if (folder / UNFINISHED).exists():
        shutil.rmtree(folder / UNFINISHED)


def seal(checkpoint: Path) -> None:
    """Write whole.json: size and sha256 of every file in a finished checkpoint."""
    files = {
        name: {
            "bytes": (checkpoint / name).stat().st_size,
            "sha256": hash_file(checkpoint / name),
        }
        for name in sorted(_list_files(checkpoint))
    }
    write_atomically(checkpoint / RECORD, json.dumps({"files": files}, indent=1) + "\n")


def publish(made: Path, folder: Path) -> Path | None:
    """Move a sealed checkpoint to its place.

    Returns:
        The new path of what stood there, if anything did.
    """
    place, aside = folder / made.name, None
    if place.exists() or place.is_symlink():
        count = 1
        aside = folder / f"{made.name}.set-aside"
        while aside.exists() or aside.is_symlink():
            count += 1
            aside = folder / f"{made.name}.set-aside-{count}"
        place.rename(aside)
    made.rename(place)
    clean(folder)
    return aside


def remove_oldest(folder: Path, limit: int, keep: Set[str]) -> dict[Path, str]:
    """Remove the oldest checkpoints beyond a number, if they are as training wrote them.

    Args:
        folder: the folder of the checkpoints.
        limit: number of checkpoints to keep.
        keep: names that are never removed, for example the newest and the best.

    Returns:
        The checkpoints that were not removed though their turn had come, and why.
    """
    ours = [path for path in numbered(folder).values() if _holds_only_ours(path)]
    excess = len(ours) - max(limit, len([path for path in ours if path.name in keep]))
    left = {}
    for path in [path for path in ours if path.name not in keep][: max(excess, 0)]:
        if _is_changed(path):
            left[path] = "its files were changed"
            continue
        try:
            removed = begin(folder) / path.name
            path.rename(removed)
            clean(folder)
        except OSError as error:
            left[path] = error.strerror or str(error)
    return left


def _holds_only_ours(path: Path) -> bool:
    """Return whether a path is a checkpoint with exactly the files that training wrote there.

    A copy under another number, which somebody made, holds the same files.
    """
    if path.is_symlink() or not path.is_dir():
        return False
    if _read_step(path) not in (None, step_of(path)):
        return False
    files = _read_record(path)
    return files is not None and _list_files(path) == files.keys()


def _is_changed(checkpoint: Path) -> bool:
    files = _read_record(checkpoint) or {}
    try:
        return any(hash_file(checkpoint / n) != one["sha256"] for n, one in files.items())
    except OSError:
        return True


def _list_files(checkpoint: Path) -> set[str]:
    """Return the relative paths of everything but directories and whole.json in a checkpoint."""
    paths = (path for path in checkpoint.rglob("*") if path.is_symlink() or not path.is_dir())
    return {path.relative_to(checkpoint).as_posix() for path in paths} - {RECORD}
