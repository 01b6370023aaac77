"""Rows of the health report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Row:
    """A check with its outcome, finding and fix."""

    check: str
    status: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""


def ok(check: str, found: str) -> Row:
    """Return the row of a check that passed."""
    return Row(check, "ok", found)


def warn(check: str, found: str, fix: str) -> Row:
    """Return the row of a problem that does not prevent the config from running."""
    return Row(check, "warn", found, fix)


def fail(check: str, found: str, fix: str) -> Row:
    """Return the row of a problem that prevents the config from running."""
    return Row(check, "fail", found, fix)
