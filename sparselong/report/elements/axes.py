"""Scales of charts: where a value is, in percent of the axis, and which values are marked."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from sparselong.report.elements.figures import show_number

_STEPS, _WHOLE_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0), (1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True)
class Axis:
    """An axis from `low` to `high`, linear or logarithmic, with marks and their texts."""

    low: float
    high: float
    marks: tuple[tuple[float, str], ...]
    is_log: bool = False

    def place(self, value: float) -> float:
        """Return where a value is, in percent of the axis."""
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = (math.log(number) for number in (low, high, value))
        return round(100 * (value - low) / (high - low), 3)


def linear_axis(values: Iterable[float], *, most: int = 5, from_zero: bool = False) -> Axis:
    """Return an axis over values, with at most so many round marks.

    Args:
        values: finite; none at all give an axis from 0 to 1.
        most: number of marks.
        from_zero: whether the axis must show 0.
    """
    found = [*values, *([0.0] if from_zero else [])] or [0.0, 1.0]
    low, high = min(found), max(found)
    if low == high:
        low, high = low - abs(low) / 10 - (low == 0), high + abs(high) / 10 + (high == 0)
        low = 0.0 if from_zero else low
    step = _round_step((high - low) / (most - 1), _STEPS)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    marks = [number * step for number in range(first, last + 1)]
    return Axis(marks[0], marks[-1], tuple((mark, _short(mark, step)) for mark in marks))


def step_axis(values: Iterable[float], *, most: int = 6) -> Axis:
    """Return an axis of counts, such as training steps, that ends with the last one."""
    found = [*values] or [0.0, 1.0]
    low, high = min(found), max(found)
    if low == high:
        low, high = low - 1, high + 1
    step = max(1.0, _round_step((high - low) / (most - 1), _WHOLE_STEPS))
    first, last = math.ceil(low / step), math.floor(high / step)
    marks = [number * step for number in range(first, last + 1)]
    return Axis(low, high, tuple((mark, show_number(round(mark))) for mark in marks))


def log2_axis(values: Iterable[float], *, most: int = 6) -> Axis:
    """Return a logarithmic axis over positive values, marked at powers of two.

    If there are few of them, 1.5 times each is marked as well, and if that is one, the ends are.
    """
    found = [*values] or [1.0, 2.0]
    low, high = min(found), max(found)
    if low == high:
        low, high = low / 2, high * 2
    powers = range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)
    marks = [2.0**power for power in powers]
    if len(marks) <= most // 2 + 1:
        marks = sorted([*marks, *(1.5 * mark for mark in marks)])
    marks = [mark for mark in marks if low <= mark <= high and mark.is_integer()]
    marks = marks[:: math.ceil(len(marks) / most) or 1]
    if len(marks) < 2:  # one mark is no scale
        marks = sorted({*marks, float(math.ceil(low)), float(math.floor(high))})
    return Axis(low, high, tuple((mark, show_number(round(mark))) for mark in marks), is_log=True)


def _round_step(step: float, steps: tuple[float, ...]) -> float:
    """Return the next larger round number: one of the steps, times a power of ten."""
    size = 10.0 ** math.floor(math.log10(step))
    return next(size * each for each in steps if size * each >= step * (1 - 1e-9))


def _short(value: float, step: float) -> str:
    """Return a mark with as many decimals as its axis's step needs."""
    size = math.floor(math.log10(step) + 1e-9)
    places = max(0, -size)
    if round(step * 10**places, 6) % 1:  # 2.5 and its like
        places += 1
    text = f"{value:,.{places}f}" if places <= 6 else f"{value:.1e}"
    return text.replace("-", "−") if value else "0"
