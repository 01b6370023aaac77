"""What a failed process's output says about the cause, without what only decorates a terminal.

Trainers write progress bars, boxes and colours around the line that matters, and often more after
it. `cause_of` returns the last exception with the place that raised it, or, if there is none, the
last lines that say something.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from sparselong.run import remove_control

_LINES = 12
_EXCEPTION_LINES = 8
_BOX = "─━│┃┄┅┆┇┈┉┊┋╌╍╎╏╭╮╰╯┌┐└┘├┤┬┴┼┏┓┗┛┣┫┳┻╋═║╔╗╚╝╠╣╦╩╬▏▎▍▌▋▊▉█╸╺"
_PROGRESS = re.compile(
    r"\d+%\|"  # tqdm:  50%|#####     | 5/10
    r"|\[\d+:\d\d(:\d\d)?(<|, )[^\]]*\]"  # tqdm: 5/10 [00:01<00:01, 4.9it/s]
    r"|[━╸╺█].*\d+%"  # rich: Training ━━━━━╸━━━━  50% 0:00:01
)
_ABORTED = re.compile(r"Aborted[!.]?")
_TRACEBACK = "Traceback (most recent call last)"
_LINKS = (
    "During handling of the above exception, another exception occurred:",
    "The above exception was the direct cause of the following exception:",
)
_NO_CAUSE = re.compile(r"(click\.exceptions\.)?(Abort|Exit)\b|SystemExit\b")
"""Exceptions that only say that another one ended the program."""


def cause_of(lines: Iterable[str]) -> list[str]:
    """Return the lines that tell why a process ended, at most a dozen.

    Args:
        lines: the last lines of its output; what a carriage return overwrote is a line too.
    """
    cleaned = [_clean(line) for line in lines]
    starts = [number for number, (line, _) in enumerate(cleaned) if _TRACEBACK in line]
    for start, end in reversed(list(zip(starts, [*starts, len(cleaned)][1:], strict=True))):
        cause, after = _read_traceback(cleaned[start + 1 : end])
        if cause and not _NO_CAUSE.match(cause[-1] if len(cause) < 2 else cause[1]):
            return (cause + _telling(after)[-(_LINES - _EXCEPTION_LINES) :])[:_LINES]
    return _telling(cleaned)[-_LINES:]


def _clean(line: str) -> tuple[str, bool]:
    """Return the text of a line without what controls a terminal, and whether it is in a box."""
    text = remove_control(line).rstrip()
    inside = text.strip().strip(_BOX)
    boxed = inside != text.strip()
    return (inside.strip() if boxed else text), boxed


def _read_traceback(
    lines: Sequence[tuple[str, bool]],
) -> tuple[list[str], Sequence[tuple[str, bool]]]:
    """Return the place and the exception of a traceback, and the lines after it."""
    place: list[str] = []
    for number, (line, boxed) in enumerate(lines):
        if line.startswith("  File "):
            place = [line.strip()]
        if boxed or not line or line[0].isspace():
            continue
        end = number + 1
        while end < len(lines) and end < number + _EXCEPTION_LINES - 1 and _goes_on(*lines[end]):
            end += 1
        return [*place, *(text for text, _ in lines[number:end])], lines[end:]
    return [], lines


def _goes_on(line: str, boxed: bool) -> bool:
    """Return whether a line after an exception's first one may belong to its message."""
    return bool(_telling([(line, boxed)])) and line not in _LINKS


def _telling(lines: Sequence[tuple[str, bool]]) -> list[str]:
    """Return the lines without empty ones, progress bars, rules and "Aborted!"."""
    return [
        line
        for line, _ in lines
        if any(letter.isalnum() for letter in line)
        and not _PROGRESS.search(line)
        and not _ABORTED.fullmatch(line.strip())
        and line not in _LINKS
    ]
