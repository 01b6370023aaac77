"""The section on stage 02's solver of BENCHMARKS.md, from benchmarks/results/solver-*.json."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.record import newest

TEXT = """
## One projection, pruned and rounded

`benchmarks/solver.py` on gpt-oss's projections, 2:4 int4 in groups of 64. `sweep` is the kernel
alone, `solve` all that `calibration.solver` does for a projection. The errors are those of the
output, relative. The last two columns are the shares of codes and mask bits in which the kernel
differs from plain torch on a CPU.
"""
COLUMNS = (
    *("projection", "shape", "sweep", "solve", "llmcompressor", "error", "llmcompressor"),
    *("other codes", "other mask bits"),
)


def write_section() -> str:
    """Return the section's text for all machines; empty if there are no results."""
    found = newest("solver").items()
    return TEXT + "".join(_write_machine(*each) for each in found) if found else ""


def _write_machine(machine: str, document: dict[str, Any]) -> str:
    values: dict[str, dict[tuple[str, str], float]] = {}
    for entry in document["rows"]:
        of_case = values.setdefault(json.dumps(entry["case"]), {})
        of_case[entry["backend"], entry["metric"]] = entry["value"]
    lines = [
        f"\n### {machine} (torch {document['versions']['torch']}, {document['date']}, "
        f"`{document['file']}`)\n",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
        *(_show(json.loads(case), found) for case, found in values.items()),
    ]
    return "\n".join([*lines, ""])


def _show(case: dict[str, Any], found: dict[tuple[str, str], float]) -> str:
    cells = [
        case["projection"],
        f"{case['rows']:,} × {case['columns']:,}",
        f"{1000 * found['sweep', 'sweep_seconds']:.1f} ms",
        *(f"{found[name, 'solve_seconds']:.3f} s" for name in ("sweep", "llmcompressor")),
        *(f"{found[name, 'relative_error']:.4f}" for name in ("sweep", "llmcompressor")),
        *(f"{found['sweep', f'different_from_cpu_{part}']:.1e}" for part in ("codes", "mask")),
    ]
    return "| " + " | ".join(cells) + " |"
