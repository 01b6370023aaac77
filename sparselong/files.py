"""Files that appear whole or not at all, and the failure that keeps them from it: a full disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_FULL_SENTENCES = (
    *("No space left on device", "Disk quota exceeded"),  # safetensors, from the system's message
    *("file write failed", "unexpected pos "),  # torch's zip writer
)


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file so that it is there whole or not at all, also after a power cut."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def is_disk_full(error: BaseException) -> bool:
    """Return whether an exception says that the disk, or the user's share of it, is full.

    An OSError of the system carries a number. safetensors and torch write through libraries of
    their own and raise exceptions that carry nothing but a sentence.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(sentence in str(error) for sentence in _FULL_SENTENCES)
