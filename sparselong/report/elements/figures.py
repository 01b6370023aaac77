"""Figures for people: GiB, minutes, percent, four digits. Raw ones are in the run's JSON files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from sparselong.figures import format_seconds

MISSING = "–"


def show(value: Any, name: str = "") -> str:
    """Return a value as text: numbers with a unit if the value's name tells one.

    Args:
        value: of JSON.
        name: the key of the value, such as `peak_bytes` or `seconds`.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return ", ".join(show(each, name) for each in value) or "none"
    if isinstance(value, Mapping):
        rows = (f"{key} {show(each, f'{name}_{key}')}" for key, each in value.items())
        return ", ".join(rows) or "none"
    if isinstance(value, int | float) and not isinstance(value, bool):
        words = name.split("_")
        if "bytes" in words:
            return show_bytes(value)
        if "seconds" in words:
            return show_seconds(value)
    return show_number(value)


def show_number(value: Any) -> str:
    """Return a number with thousands separated and, unless it is whole, four digits."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return MISSING if math.isnan(value) else "∞" if value > 0 else "−∞"
    return _digits(value, 4)


def show_change(value: float, stderr: float | None = None, decimals: int = 2) -> str:
    """Return a difference with its sign, and with its standard error if there is one."""
    if not math.isfinite(value):
        return show_number(value)
    text = f"{value:+,.{decimals}f}".replace("-", "−")
    if stderr is None:
        return text
    return f"{text} ± {f'{stderr:,.{decimals}f}' if math.isfinite(stderr) else MISSING}"


def show_percent(fraction: float | None, decimals: int = 1) -> str:
    """Return a fraction in percent."""
    if fraction is None or not math.isfinite(fraction):
        return show_number(fraction)
    return f"{100 * fraction:.{decimals}f} %".replace("-", "−")


def show_bytes(count: float | None) -> str:
    """Return a byte count in GiB, from a tenth of one, or else in MiB, KiB or bytes.

    So figures that are compared with each other mostly have the same unit.
    """
    if count is None or not math.isfinite(count):
        return MISSING
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size / 10:
            return f"{count / size:,.2f} {unit}"
    return f"{count:,.0f} B"


def show_seconds(seconds: float | None) -> str:
    """Return a duration in seconds, minutes or hours."""
    return MISSING if seconds is None or not math.isfinite(seconds) else format_seconds(seconds)


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value is a finite number."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(float(value))
    )


def _digits(value: float, digits: int) -> str:
    """Return a finite number with so many significant digits; with an exponent if it is tiny."""
    size = abs(value)
    if size != 0 and size < 1e-3:
        return f"{value:.{digits - 2}e}".replace("-", "−")
    places = max(0, digits - 1 - (math.floor(math.log10(size)) if size else 0))
    return f"{value:,.{min(places, digits)}f}".replace("-", "−")
