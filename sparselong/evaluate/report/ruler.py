"""RULER's tasks among those of a result."""

from __future__ import annotations

from typing import Any

from sparselong.config import RULER_TASKS


def split_ruler(
    tasks: dict[str, dict[str, Any]],
) -> tuple[dict[tuple[str, int], dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return RULER's tasks by name and length, in this order, and all others."""
    drawn, others = {}, {}
    for name, rows in tasks.items():
        task, _, length = name.rpartition("_")
        if task in RULER_TASKS and length.isdecimal():
            drawn[task, int(length)] = rows
        else:
            others[name] = rows
    return drawn, others
