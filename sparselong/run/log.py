"""Lines of log.txt, which hold no characters that would control a terminal."""

from __future__ import annotations

import re
import time
from pathlib import Path

LOG = "log.txt"
_CONTROL = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # colours and cursor movements
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)"  # titles and links
    r"|\x1b[@-_]|[\x00-\x08\x0b-\x1f\x7f-\x9f]"  # tab and line feed may stay
)


def remove_control(text: str) -> str:
    """Return a text without the characters and sequences that control a terminal."""
    return _CONTROL.sub("", text)


def add_to_log(path: Path, message: str) -> None:
    """Append a message, and when it was, to a log."""
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {remove_control(message)}\n")
