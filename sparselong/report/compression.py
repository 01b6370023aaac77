"""Stage 02: sizes, what was kept exactly, and the error of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparselong.report.elements import (
    Markup,
    Series,
    chart,
    folded,
    linear_axis,
    note,
    pairs,
    show,
    show_anything,
    show_bytes,
    show_number,
    show_percent,
    step_axis,
    table,
)
from sparselong.report.source import COMPRESS, Run

_COLOURS = ("first", "second", "third", "fourth", "fifth", "sixth")
_KNOWN = (
    *("name", "bytes_on_disk", "base_bytes_on_disk", "bytes_linked", "bits_per_weight"),
    *("experts_bit_exact", "two_four_conforming", "masters_match", "relative_error"),
    *("calibration_sequences", "peak_host_bytes", "peak_device_bytes", "kept_experts"),
)


def compression(run: Run) -> list[Markup]:
    """Return what stage 02 measured on the files that it wrote."""
    metrics = run.metrics(COMPRESS)
    bits = metrics.get("bits_per_weight", {})
    rest = {key: value for key, value in metrics.items() if key not in _KNOWN}
    return [
        pairs(_facts(metrics)),
        table(
            ["weights", "bits per weight"],
            [[g.replace("_", " "), show(b)] for g, b in bits.items()],
        ),
        *_errors(metrics.get("relative_error", [])),
        *_kept_experts(metrics.get("kept_experts", {})),
        *(show_anything(rest) if rest else []),
    ]


def _facts(metrics: Mapping[str, Any]) -> dict[str, str]:
    facts = {}
    size, base = metrics.get("bytes_on_disk"), metrics.get("base_bytes_on_disk")
    if size and base:
        facts["Compressed model"] = f"{show_bytes(size)}, {show_percent(size / base)} of the base's"
        facts["Base model"] = show_bytes(base)
    if metrics.get("bytes_linked"):
        facts["Shared with the base's files"] = show_bytes(metrics["bytes_linked"])
    if "experts_bit_exact" in metrics:
        facts["Experts bit-exact"] = show_number(metrics["experts_bit_exact"])
    if metrics.get("two_four_conforming") is not None:
        facts["Groups of four that are 2:4"] = show_percent(metrics["two_four_conforming"])
    if "masters_match" in metrics:
        facts["Masters round to the stored codes"] = show_number(metrics["masters_match"])
    if "calibration_sequences" in metrics:
        facts["Calibration sequences"] = show_number(metrics["calibration_sequences"])
    return facts


def _kept_experts(found: Mapping[str, Any]) -> list[Markup]:
    """Return which experts each layer kept and what it lost; nothing if it has all of them."""
    if not found:
        return []
    rows = [
        [
            number,
            layer["kept"],
            show_percent(layer["lost_weight"]),
            layer["unreached"],
            layer["scores"],
        ]
        for number, layer in enumerate(found["layers"])
    ]
    text = (
        f"Experimental: each layer has {found['experts']} of the base's {found['base']} experts. "
        f"The others had {show_percent(found['lost_weight'])} of the routing weight (mean)."
    )
    columns = ["layer", "experts kept", "lost weight", "without tokens", "scores of all experts"]
    return [note(text, kind="warning"), folded("Experts by layer", table(columns, rows))]


def _errors(layers: list[Mapping[str, float]]) -> list[Markup]:
    """Return the relative error of each projection by layer, as a chart and a table."""
    names = list(dict.fromkeys(name for layer in layers for name in layer))
    if not names:
        return [note("No layer's error was recorded.")]
    series = [
        Series(
            name,
            [(number, layer[name]) for number, layer in enumerate(layers) if name in layer],
            _COLOURS[index % len(_COLOURS)],
            has_dots=len(layers) <= 40,
        )
        for index, name in enumerate(names)
    ]
    points = [point for each in series for point in each.finite]
    axes = (step_axis(x for x, _ in points), linear_axis((y for _, y in points), from_zero=True))
    title = "Relative error of each projection's outputs on the calibration text"
    drawn = chart(series, axes, ("layer", "relative error"), title)
    rows = [
        [number, *(show_number(layer.get(name)) for name in names)]
        for number, layer in enumerate(layers)
    ]
    return [drawn, folded("Errors by layer", table(["layer", *names], rows))]
