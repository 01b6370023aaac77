"""The section on stage 02 at true widths, from benchmarks/results/compress_rate*.json."""

from __future__ import annotations

import json
import statistics
from typing import Any

from benchmarks.compress_rate import BESIDE, COMPUTED, SUBJECTS
from benchmarks.record import newest
from benchmarks.report.figures import group_by_case

TEXT = """
## Stage 02 on true widths

`benchmarks/compress_rate.py` compresses layers with random weights in the published form. A layer
takes what its computation waits for: `load` (the layer to be read and copied to the GPU),
`calibrate` (Hessians), `solve`, `refine` (a dash: measured before stage 02 refined), `pack`,
`forward`, and `wait` (for the layer before to be written). `read`, `write` and `hash` are seconds
of threads beside it. Medians of all layers but the first, which compiles kernels. `predicted` is
01_health's estimate of the whole script.
"""
COLUMNS = ("shape", "layer", *COMPUTED, *BESIDE, "all layers")
RUNS = ("shape", "layers", "script", "predicted", "GPU", "planned", "host", "after a kill")


def write_section() -> str:
    """Return the section's text for all machines; empty if there are no results."""
    found = [newest(subject) for subject in SUBJECTS.values()]
    machines = sorted({machine for documents in found for machine in documents})
    if not machines:
        return ""
    return TEXT + "".join(
        _write_machine(machine, [d[machine] for d in found if machine in d]) for machine in machines
    )


def _write_machine(machine: str, documents: list[dict[str, Any]]) -> str:
    files = ", ".join(f"`{document['file']}`" for document in documents)
    first = documents[0]
    lines = [
        f"\n### {machine} (torch {first['versions']['torch']}, {first['date']}, {files})\n",
        *_table(COLUMNS, [_show_layers(document) for document in documents]),
        "",
        *_table(RUNS, [_show_run(document) for document in documents]),
    ]
    return "\n".join([*lines, ""])


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    head = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return head + ["| " + " | ".join(row) + " |" for row in rows]


def _cases(document: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, float]]]:
    return [(json.loads(text), figures) for text, figures in group_by_case(document).items()]


def _show_layers(document: dict[str, Any]) -> list[str]:
    layers = [figures for case, figures in _cases(document) if case.get("layer", 0) > 0]
    case, whole = next(found for found in _cases(document) if "seconds" in found[1])
    names = [f"{part}_seconds" for part in (*COMPUTED, *BESIDE)]
    return [
        case["shape"],
        f"{whole['median_layer_seconds']:.2f} s",
        *(_median(layers, name) for name in names),
        f"{whole['all_layers_seconds']:.0f} s" if "all_layers_seconds" in whole else "",
    ]


def _median(layers: list[dict[str, float]], name: str) -> str:
    """Return the median of a part's seconds; a dash where a file is older than the part."""
    if not any(name in figures for figures in layers):
        return "–"
    return f"{statistics.median(figures[name] for figures in layers):.2f}"


def _show_run(document: dict[str, Any]) -> list[str]:
    case, whole = next(found for found in _cases(document) if "seconds" in found[1])
    killed = [figures for _, figures in _cases(document) if "equal_files" in figures]
    resumed = [
        f"{f['equal_files']:.0f} files equal, {f['different_files']:.0f} not" for f in killed
    ]
    gpus = [size for name, size in whole.items() if name.startswith("peak_bytes: cuda")]
    return [
        case["shape"],
        str(case["layers"]),
        f"{whole['script_seconds']:.0f} s",
        f"{whole['predicted_seconds']:.0f} s",
        f"{max(gpus) / 2**30:.2f} GiB" if gpus else "",
        f"{whole['peak_bytes: planned'] / 2**30:.2f} GiB",
        f"{whole['peak_bytes: host'] / 2**30:.2f} GiB",
        "; ".join(resumed),
    ]
