"""Figures as people read them: GiB, minutes. Files for programs hold bytes and seconds."""

from __future__ import annotations


def format_bytes(count: int | float) -> str:
    """Return a byte count in GiB, MiB or KiB with two decimals, or in bytes."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def format_seconds(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours, depending on its length."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
