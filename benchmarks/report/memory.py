"""The memory section of BENCHMARKS.md, from benchmarks/results/memory-*.json."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.memory import kept_in, predict
from benchmarks.record import newest

TEXT = """
## Predicted and measured memory of a training step

gpt-oss-20b's shape, stage 03's masked LoRA, each case in its own process. `card` is the device
memory of the process (torch's peak reserved memory and the CUDA context), `predicted` is the
prediction of this version's planner. `allocated` is the peak size of all tensors; the difference to
`card` is the context and the allocator's fragmentation. `kept` is what checkpointed layers keep for
the backward pass instead of recomputing it: outputs of full attention, or the experts' gate_up
outputs, of all layers or of the last ones. `slices` are tokens that layers compute at once,
`offloaded` says whether their inputs are in host memory. Offloading by Axolotl is no longer used,
and not predicted.
"""
COLUMNS = (
    *("layers", "tokens", "rank", "kept", "slices", "offloaded"),
    *("allocated", "card", "predicted", "error"),
)


def write_section() -> str:
    """Return the section's text for all machines; empty if there are no results."""
    found = newest("memory")
    if not found:
        return ""
    return TEXT + "".join(write_machine(machine, found[machine]) for machine in found)


def write_machine(machine: str, document: dict[str, Any]) -> str:
    """Return one machine's table, with a row for each case."""
    cases: dict[str, dict[str, float]] = {}
    for entry in document["rows"]:
        cases.setdefault(json.dumps(entry["case"]), {})[entry["metric"]] = entry["value"]
    lines = [
        f"\n### {machine} (torch {document['versions']['torch']}, {document['date']}, "
        f"`{document['file']}`)\n",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
    ]
    for text, figures in cases.items():
        case = json.loads(text)
        attention, experts = kept_in(case)
        kept = ["attention"] if attention else []
        if experts:
            kept.append("experts" if experts == case["layers"] else f"experts of {experts} layers")
        measured, rows = figures["device_bytes"], case.get("slice_rows")
        is_ours = rows is not None or not case["offload"]
        offloaded = ("yes" if is_ours else "by Axolotl") if case["offload"] else "no"
        prediction = ["–", "–"]
        if is_ours:
            predicted = predict(case).peak_bytes
            prediction = [f"{predicted / 2**30:.2f} GiB", f"{predicted / measured - 1:+.1%}"]
        cells = [
            f"{case['layers']}",
            f"{case['tokens']:,} × {case['batch']}",
            f"{case['rank']}",
            ", ".join(kept) or "nothing",
            "–" if rows in (None, "never") else f"{rows:,}",
            offloaded,
            *(f"{n / 2**30:.2f} GiB" for n in (figures["allocated_bytes"], measured)),
            *prediction,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])
