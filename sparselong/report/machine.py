"""Stage 01's checks, and what was planned beside what was measured: memory, disk, time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparselong.report.elements import (
    MISSING,
    Child,
    Markup,
    element,
    folded,
    note,
    show_bytes,
    show_change,
    show_seconds,
    stacked_bars,
    table,
)
from sparselong.report.source import COMPRESS, EVAL, FINETUNE, HEALTH, Run

_STAGES = (COMPRESS, FINETUNE, EVAL)
"""Those whose memory and time are planned."""
_MEASURED = "measured"
_REST, _SMALL = "smaller components", 0.01
"""Components of less than this fraction of each stage's peak are added up."""
_COLOURS = tuple(f"part{number}" for number in range(8))


def checks(run: Run) -> list[Markup]:
    """Return what stage 01 found; what is not ok first."""
    rows = run.metrics(HEALTH).get("rows", [])
    head = ["check", "", "found", "fix"]
    told = [[r["check"], r["status"], r["found"], r["fix"]] for r in rows if r["status"] != "ok"]
    fine = [[r["check"], r["status"], r["found"]] for r in rows if r["status"] == "ok"]
    return [
        note(f"{len(fine)} ok, {len(told)} with a warning. The machine could run this config."),
        *([table(head, told, texts=4)] if told else []),
        *([folded("Checks that are ok", table(head[:3], fine, texts=3))] if fine else []),
    ]


def memory(run: Run) -> list[Markup]:
    """Return memory and time of each stage, planned and measured, and planned disk space."""
    plan = run.metrics(HEALTH).get("plan", {})
    planned: dict[str, dict[str, int]] = {
        stage: {name: size for name, size in parts.items() if size}
        for stage, parts in plan.get("components_at_peak", {}).items()
    }
    on_gpu = plan.get("device") == "cuda"
    measured = {stage: _measured(run, stage, on_gpu) for stage in _STAGES}
    shown = {stage: _without_small(parts, planned) for stage, parts in planned.items()}
    disk = [
        [name, show_bytes(size)] for name, size in plan.get("bytes_on_disk", {}).items() if size
    ]
    return [
        note(_how(plan) if plan else "Nothing was planned: stage 01 is not done."),
        _bars(shown, measured, "on each GPU" if on_gpu else "of the process"),
        _memory_table(shown, measured),
        *([folded("All planned components", _memory_table(planned, measured))] if plan else []),
        _time_table(run, plan.get("estimated_seconds", {})),
        *([folded("Planned disk space", table(["files", "size"], disk))] if disk else []),
    ]


def _without_small(
    parts: Mapping[str, int], planned: Mapping[str, Mapping[str, int]]
) -> dict[str, int]:
    """Return components, those added up that are small in every stage."""
    large = {
        name
        for each in planned.values()
        for name, size in each.items()
        if size >= _SMALL * sum(each.values())
    }
    found = {name: size for name, size in parts.items() if name in large}
    rest = sum(size for name, size in parts.items() if name not in large)
    return {**found, _REST: rest} if rest else found


def _colours(planned: Mapping[str, Mapping[str, int]]) -> dict[str, str]:
    """Return a class of the style sheet for each component, the largest component first."""
    names = {name for parts in planned.values() for name in parts}
    largest = {name: max(parts.get(name, 0) for parts in planned.values()) for name in names}
    order = sorted(names, key=lambda name: (name == _REST, -largest[name]))
    last = len(_COLOURS) - 1
    return {
        name: _COLOURS[last if name == _REST else min(index, last)]
        for index, name in enumerate(order)
    }


def _measured(run: Run, stage: str, on_gpu: bool) -> int | None:
    """Return a stage's peak on the kind of device that was planned for."""
    peaks = run.manifests.get(stage, {}).get("peak_bytes", {})
    found = [count for device, count in peaks.items() if (device != "host") is on_gpu]
    return max(found, default=None)


def _how(plan: Mapping[str, Any]) -> str:
    """Return what was planned for, and how experts are held, and what layers do and keep."""
    told = [f"Planned for {plan['estimated_for']}." if "estimated_for" in plan else ""]
    if plan.get("held_reason"):
        told.append(f"Experts: {plan.get('expert_placement')} ({plan['held_reason']}).")
    if plan.get("layers_reason"):
        told.append(f"Layers: {plan.get('layers')} ({plan['layers_reason']}).")
    if plan.get("kept"):
        told.append(f"Kept for the backward pass: {plan['kept']}.")
    return " ".join(filter(None, told))


def _bars(
    planned: Mapping[str, Mapping[str, int]],
    measured: Mapping[str, int | None],
    where: str,
) -> Markup:
    """Return bars of each stage's peak, planned by component and measured."""
    bars = []
    for stage in _STAGES:
        parts, peak = planned.get(stage), measured[stage]
        if parts:
            bars.append((f"{stage}, planned", parts, show_bytes(sum(parts.values()))))
        if peak:
            bars.append((f"{stage}, measured", {_MEASURED: peak}, show_bytes(peak)))
    title = f"Peak memory {where}, planned by component and measured"
    return stacked_bars(bars, {**_colours(planned), _MEASURED: "measured"}, title)


def _memory_table(
    planned: Mapping[str, Mapping[str, int]], measured: Mapping[str, int | None]
) -> Markup:
    """Return the bytes of each component at each stage's peak, and the peak that was measured."""
    parts = [planned.get(stage, {}) for stage in _STAGES]
    totals = [sum(each.values()) or None for each in parts]
    peaks = [measured[stage] for stage in _STAGES]
    rows: list[list[Child]] = [
        [
            [element("i", class_=f"chip {colour}"), name],
            *(show_bytes(each.get(name)) for each in parts),
        ]
        for name, colour in _colours(planned).items()
    ]
    rows += [
        [element("b", "planned"), *map(show_bytes, totals)],
        [element("b", "measured"), *map(show_bytes, peaks)],
        ["difference", *map(_difference, totals, peaks)],
    ]
    return table(["memory at the peak", *_STAGES], rows)


def _time_table(run: Run, estimates: Mapping[str, float]) -> Markup:
    planned = [estimates.get(stage) for stage in _STAGES]
    measured = [run.manifests.get(stage, {}).get("seconds") for stage in _STAGES]
    rows: list[list[Child]] = [
        ["planned", *map(show_seconds, planned)],
        ["measured", *map(show_seconds, measured)],
        ["difference", *map(_difference, planned, measured)],
    ]
    return table(["time", *_STAGES], rows)


def _difference(planned: float | None, measured: float | None) -> str:
    if not planned or not measured:
        return MISSING
    return f"{show_change(100 * (measured / planned - 1), decimals=0)} %"
