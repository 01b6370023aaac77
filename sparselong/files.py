"""JSON read strictly, atomic writes, links, a full disk, and telling paths from hub names."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparselong.errors import StageError

_FULL_SENTENCES = (
    *("No space left on device", "Disk quota exceeded"),  # safetensors, from the system's message
    *("file write failed", "unexpected pos "),  # torch's zip writer
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".gz", ".zst", ".zip", ".parquet")

LFS_POINTER = "version https://git-lfs"
"""How the small text file begins that git leaves in place of a large one."""


def parse_json(text: str, constant: Callable[[str], Any] | None = None) -> Any:
    """Return a JSON document in which no object has a key twice.

    Of two equal keys, one reader takes the first and another the last.

    Args:
        text: the document.
        constant: gives the value of NaN and the infinities by name; None: that of `float`.

    Raises:
        ValueError: the text is not JSON, has a key twice, or is nested too deeply to be read.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=constant)
    except RecursionError as error:
        raise ValueError("lists or objects nested too deeply for Python to read") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {ascii(twice)} occurs twice in one object")
    return found


def load_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else; the text says what.
    """
    refuse_special(path)
    text = path.read_text(encoding="utf-8")
    if text.startswith(LFS_POINTER):
        raise ValueError("a Git LFS pointer instead of the file: run git lfs pull")
    document = parse_json(text)
    if not isinstance(document, dict):
        raise ValueError(f"a JSON {type(document).__name__}")
    return document


def read_json(path: Path, fix: str = "download the checkpoint again") -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        StageError: the file cannot be read or holds something else; with the given fix.
    """
    try:
        return load_json(path)
    except (OSError, ValueError) as error:
        found = reason_of(error)
        raise StageError(f"{path} cannot be read", "a JSON object in a file", found, fix) from error


def refuse_special(path: Path) -> None:
    """Raise OSError unless the path leads to a regular file; opening a pipe would wait for ever."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "a directory", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def reason_of(error: Exception) -> str:
    """Return why a file could not be read, on one line and without its path."""
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    return " ".join(text.split()) or type(error).__name__


def is_local(name: str) -> bool:
    """Return whether a name can only mean a local file or directory, which may be missing.

    Any other name may be one on the Hugging Face Hub: `NAME` or `OWNER/NAME`.
    """
    return not _HUB_NAME.fullmatch(name) or name.endswith(_DATA_SUFFIXES) or os.path.exists(name)


def why_unusable(path: str | Path, wanted: str) -> str:
    """Return why a path does not lead to a `wanted` (such as `directory`), in a few words."""
    try:
        found = "a file" if stat.S_ISREG(os.stat(path).st_mode) else "something else"
        return "a directory" if os.path.isdir(path) else found
    except FileNotFoundError:
        return f"no such {wanted}"
    except (OSError, ValueError) as error:  # ValueError: characters that no name can have
        return (isinstance(error, OSError) and error.strerror) or str(error)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that exists completely or not at all, even after a power failure.

    What was written of it is removed if the disk is full.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if is_disk_full(error):
            partial.unlink(missing_ok=True)
        raise
    partial.replace(path)


def copy_atomically(source: Path, target: Path) -> None:
    """Copy a file that then exists completely or not at all; a failed copy is removed."""
    partial = target.with_name(target.name + ".partial")
    try:
        shutil.copyfile(source, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(target)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and is_disk_full(error):
            error.filename, error.filename2 = str(target), None  # shutil names the source first
        raise


def link_file(source: Path, target: Path) -> bool:
    """Make `target` a hard link to the file `source`; return whether that was possible.

    Many file systems have no hard links, or none between these places, and each says so by another
    error. The caller copies the file then. Only a full disk is raised, since no copy fits either.
    """
    try:
        os.link(os.path.realpath(source), target)
    except OSError as error:
        if is_disk_full(error):
            raise
        return False
    return True


def point_to(link: Path, target: str, tell: Callable[[str], None]) -> None:
    """Make `link` a symbolic link to `target`, for people's convenience only.

    Nothing reads the link, so a failure is told in one line and ends nothing. An older link is
    replaced at once; a file or directory in its place is left alone.
    """
    partial = link.with_name(f".{link.name}.partial")
    try:
        if os.path.lexists(link) and not link.is_symlink():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        partial.unlink(missing_ok=True)
        partial.symlink_to(target)
        partial.replace(link)
    except OSError as error:
        reason = error.strerror or str(error)
        tell(f"{link} is not made a link to {target}: {reason} (only a convenience)")


def is_disk_full(error: BaseException) -> bool:
    """Return whether an exception reports a full disk or an exhausted quota.

    OSErrors from system calls have an errno. safetensors and torch write through native libraries
    whose exceptions have only a message.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(sentence in str(error) for sentence in _FULL_SENTENCES)
