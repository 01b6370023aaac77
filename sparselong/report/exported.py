"""Stage 05: each form that was written, and how it was compared with its source."""

from __future__ import annotations

from sparselong.report.elements import (
    Child,
    Markup,
    folded,
    note,
    show,
    show_anything,
    show_bytes,
    show_number,
    show_seconds,
    table,
)
from sparselong.report.source import EXPORT, Run

_KNOWN = ("bytes", "reloaded", "tensors_identical", "peak_host_bytes")


def exported(run: Run) -> list[Markup]:
    """Return the finished forms."""
    parts = {
        name.partition("/")[2]: manifest
        for name, manifest in run.manifests.items()
        if name.startswith(f"{EXPORT}/")
    }
    rows: list[list[Child]] = []
    more = []
    for part, manifest in parts.items():
        metrics = manifest["metrics"]
        rows.append(
            [
                part,
                show(manifest.get("options", {})),
                show_bytes(metrics.get("bytes")),
                len(manifest["outputs"]),
                show_number(metrics.get("reloaded")),
                show_number(metrics.get("tensors_identical")),
                show_seconds(manifest["seconds"]),
            ]
        )
        rest = {key: value for key, value in metrics.items() if key not in _KNOWN}
        if rest:
            more.append(folded(f"{part}: more", show_anything(rest)))
    head = ["form", "options", "size", "files", "opened again", "same tensors", "time"]
    return [
        note("Each form was opened again as its readers do, and compared with the model."),
        table(head, rows, texts=2),
        *more,
    ]
