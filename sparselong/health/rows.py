"""One line of the health report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Row:
    """A check with its outcome, what was found, and what to do about it."""

    check: str
    status: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""


def ok(check: str, found: str) -> Row:
    """A check that passed."""
    return Row(check, "ok", found)


def warn(check: str, found: str, fix: str) -> Row:
    """Something that does not stop the config from running."""
    return Row(check, "warn", found, fix)


def fail(check: str, found: str, fix: str) -> Row:
    """Something that does."""
    return Row(check, "fail", found, fix)
