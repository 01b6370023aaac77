"""Atomic writes of text files, links, a full disk, and telling paths from hub names."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

_FULL_SENTENCES = (
    *("No space left on device", "Disk quota exceeded"),  # safetensors, from the system's message
    *("file write failed", "unexpected pos "),  # torch's zip writer
)


_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".gz", ".zst", ".zip", ".parquet")


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
    """Write a text file that exists completely or not at all, even after a power failure."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


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
    replaced; a file or directory in its place is left alone.
    """
    try:
        if link.is_symlink():
            link.unlink()
        link.symlink_to(target)
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
