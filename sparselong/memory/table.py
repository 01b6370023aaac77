"""Formatting of plans as plain text, at most 100 columns wide."""

from __future__ import annotations

import textwrap
from typing import Any

WIDTH = 100


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


def format_table(title: str, rows: dict[str, str]) -> list[str]:
    """Return the lines of a two-column table with right-aligned values."""
    if not rows:
        return []
    left = min(max(map(len, rows)), WIDTH - 20)
    right = max(map(len, rows.values()))
    short = {name: name if len(name) <= left else f"…{name[1 - left :]}" for name in rows}
    return [
        title,
        *(f"  {short[name]:<{left}}  {value:>{right}}" for name, value in rows.items()),
    ]


def memory_lines(document: dict[str, Any]) -> list[str]:
    """Return the lines of the memory table of a plan document (plan_stage or Plan.to_dict).

    A document of stage 03 or 04 with several processes has a column each for replicated and for
    shared experts and vocabulary, and a line that says which was chosen.
    """
    title = "Memory on each GPU" if document["device"] == "cuda" else "Host memory"
    if document.get("sharded_bytes_per_gpu"):
        return _two_columns(title, document)
    parts = {name: format_bytes(size) for name, size in document["bytes_per_gpu"].items() if size}
    if not parts:
        return []
    return format_table(title, {**parts, "peak": format_bytes(document["peak_bytes_per_gpu"])})


def _two_columns(title: str, document: dict[str, Any]) -> list[str]:
    """Return the table of a stage's memory, replicated and sharded, and the choice."""
    left, right = document["replicated_bytes_per_gpu"], document["sharded_bytes_per_gpu"]
    names = [name for name in left | right if left.get(name) or right.get(name)]
    pairs = {name: (left.get(name, 0), right.get(name, 0)) for name in names}
    pairs["peak"] = tuple(
        document[f"{how}_peak_bytes_per_gpu"] for how in ("replicated", "sharded")
    )
    columns = {
        name: "".join(f"{format_bytes(size) if size else '-':>12}" for size in sizes)
        for name, sizes in pairs.items()
    }
    head = {"": f"{'replicated':>12}{'sharded':>12}"}
    degree = document["expert_parallel_degree"]
    chosen = f"sharded over {degree} processes" if degree > 1 else "replicated"
    text = f"Chosen for experts and vocabulary: {chosen} ({document['expert_parallel_reason']})"
    wrapped = textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ")
    return [*format_table(title, head | columns), *wrapped]


def show_plan(document: dict[str, Any]) -> str:
    """Return a `plan_stage` document as plain text, at most 100 columns wide."""
    lines = [f"Plan of {document['stage']} (nothing was changed)"]
    for title in ("reads", "writes"):
        rows = {
            f"{row['path']} ({row['what']})": format_bytes(row["bytes"]) if row["bytes"] else "-"
            for row in document[title]
        }
        lines += format_table(title.capitalize(), rows)
    lines.append(f"Bytes on disk: {format_bytes(document['bytes_on_disk'])}")
    lines += memory_lines(document)
    lines.append(f"Estimated time: {format_seconds(document['estimated_seconds'])}")
    for note in document["notes"]:
        lines += textwrap.wrap(note, WIDTH, initial_indent="- ", subsequent_indent="  ")
    return "\n".join(lines)
