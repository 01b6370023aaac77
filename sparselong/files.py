"""Atomic writes of text files, detection of a full disk, and telling paths from hub names."""

from __future__ import annotations

import errno
import os
import re
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
