"""The section on exports of BENCHMARKS.md, from benchmarks/results/export-*.json."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.record import newest
from benchmarks.report.figures import group_by_case

TEXT = """
## Exports

`05_export.py` on random weights in the models' true widths, attention in 2:4 and int4, vocabulary
201,088, one process a form. `work` is processor time, user and system, of all threads. `wall` is
with the disk; `disk` is what the process read and wrote, as the kernel counted it, at the rates at
which the disk streamed just before. `memory` is the peak of resident host memory. Each form is
compared with its source by the stage itself; the GGUF file was opened by the package's reader once
more, and every tensor was equal (`checked`).
"""
COLUMNS = (
    "widths",
    "layers",
    "form",
    "size",
    "work",
    "wall",
    "disk",
    "memory",
    "tensors",
    "checked",
)


def write_section() -> str:
    """Return the section's text for all machines; empty if there are no results."""
    found = newest("export")
    if not found:
        return ""
    return TEXT + "".join(_write_machine(machine, found[machine]) for machine in found)


def _write_machine(machine: str, document: dict[str, Any]) -> str:
    cases = group_by_case(document)
    lines = [
        f"\n### {machine} (torch {document['versions']['torch']}, {document['date']}, "
        f"`{document['file']}`)\n",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
    ]
    for text, figures in cases.items():
        case = json.loads(text)
        cells = [
            {"true": "120b"}.get(case["widths"], case["widths"]),
            f"{case['layers']}",
            case["form"],
            f"{figures['bytes'] / 1e9:.2f} GB",
            *(f"{figures[f'{name}_seconds']:.0f} s" for name in ("work", "wall", "disk")),
            f"{figures['peak_host_bytes'] / 2**30:.2f} GiB",
            f"{figures['tensors']:.0f}",
            f"{figures['equal_tensors']:.0f}" if "equal_tensors" in figures else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])
