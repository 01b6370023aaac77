"""Atomic writes of text files, and detection of a full disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_FULL_SENTENCES = (
    *("No space left on device", "Disk quota exceeded"),  # safetensors, from the system's message
    *("file write failed", "unexpected pos "),  # torch's zip writer
)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that exists completely or not at all, even after a power failure."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def is_disk_full(error: BaseException) -> bool:
    """Return whether an exception reports a full disk or an exhausted quota.

    OSErrors from system calls have an errno. safetensors and torch write through native libraries
    whose exceptions have only a message.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(sentence in str(error) for sentence in _FULL_SENTENCES)
