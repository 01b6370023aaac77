"""Formatting of plans as plain text, at most 100 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from sparselong.figures import format_bytes, format_seconds

WIDTH = 100


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

    A document of stage 03 or 04 has a column each for replicated experts and vocabulary, shared
    ones, and experts in host memory, as far as the config allows them, and a line on which was
    chosen. One of training has lines on how checkpointed layers compute and what they keep.
    """
    title = "Memory on each GPU" if document["device"] == "cuda" else "Host memory"
    if any(document.get(f"{way}_bytes_per_gpu") for way in ("sharded", "hosted")):
        return _columns(title, document)
    parts = {name: format_bytes(size) for name, size in document["bytes_per_gpu"].items() if size}
    if not parts:
        return []
    table = format_table(title, {**parts, "peak": format_bytes(document["peak_bytes_per_gpu"])})
    return [*table, *_layers(document)]


def _layers(document: dict[str, Any]) -> list[str]:
    """Return the lines on how checkpointed layers compute; none for a stage without them."""
    if "layers" not in document:
        return []
    there = document["input_host_bytes"]
    how = document["layers"] + (f" ({format_bytes(there)} there)" if there else "")
    lines = _wrap(f"Checkpointed layers: {how} ({document['layers_reason']})")
    if document["kept"]:
        lines += _wrap(f"Outputs kept for the backward pass: {document['kept']}")
    return lines


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ")


_WAYS = {"replicated": "replicated", "sharded": "sharded", "hosted": "host memory"}


def _columns(title: str, document: dict[str, Any]) -> list[str]:
    """Return the table of a stage's memory, experts held in each way, and the choice."""
    parts = {way: document[f"{way}_bytes_per_gpu"] for way in _WAYS}
    parts = {way: components for way, components in parts.items() if components}
    names = dict.fromkeys(name for way in reversed(parts) for name in parts[way])
    rows = {name: [components.get(name, 0) for components in parts.values()] for name in names}
    rows = {name: sizes for name, sizes in rows.items() if any(sizes)}
    rows["peak"] = [document[f"{way}_peak_bytes_per_gpu"] for way in parts]
    columns = {
        name: "".join(f"{format_bytes(size) if size else '-':>13}" for size in sizes)
        for name, sizes in rows.items()
    }
    head = {"": "".join(f"{_WAYS[way]:>13}" for way in parts)}
    degree = document["expert_parallel_degree"]
    chosen = f"sharded over {degree} processes" if degree > 1 else "replicated"
    if document["expert_placement"] == "host":
        chosen += f", experts in host memory ({format_bytes(document['expert_host_bytes'])} there)"
    text = f"Chosen for experts and vocabulary: {chosen} ({document['held_reason']})"
    return [*format_table(title, head | columns), *_wrap(text), *_layers(document)]


def cost_lines(estimates: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a table of time and cost by type of GPU; none for a processor.

    Args:
        estimates: `gpu`, `gpus`, `hours`, `gpu_hours` and `cost` of each (timing.Estimate).
    """
    rows = {
        f"{one['gpus']} x {one['gpu']}": f"{format_seconds(3600 * one['hours'])}, "
        f"{one['gpu_hours']:.2f} GPU hours, cost {show_cost(one['cost'])}"
        for one in estimates
        if one["gpus"]
    }
    return format_table("Estimated time and cost", rows)


def show_cost(cost: float | None) -> str:
    """Return a cost with two decimals, or that there is no price to compute it from."""
    return "not known: set cost.per_gpu_hour" if cost is None else f"{cost:,.2f}"


def _profile_lines(profile: Mapping[str, Any]) -> list[str]:
    """Return what the config's profile sets, and where a value of one's own replaces it."""
    rows = {}
    for row in profile["sets"]:
        value = f"{row['used']} (default {row['default']})"
        if row["used"] != row["profile"]:
            value = f"{row['used']}, set in place of the profile's {row['profile']}"
        rows[row["key"]] = value
    title = f"Profile {profile['name']}"
    return format_table(title, rows) or [f"{title}: the default of every key"]


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
    lines += cost_lines(document.get("estimates", ()))
    lines += _profile_lines(document["profile"]) if "profile" in document else []
    for note in document["notes"]:
        lines += textwrap.wrap(note, WIDTH, initial_indent="- ", subsequent_indent="  ")
    return "\n".join(lines)
