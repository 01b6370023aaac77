"""Figures as people read them: GiB, minutes. Files for programs hold bytes and seconds."""

from __future__ import annotations

from typing import Any


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


def format_figure(name: str, value: Any) -> str:
    """Return a figure of a JSON document in the unit that its name ends with, or as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    words = name.split("_")
    if "bytes" in words:
        return format_bytes(value)
    if "seconds" in words:
        return format_seconds(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
