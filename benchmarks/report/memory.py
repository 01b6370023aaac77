"""The memory section of BENCHMARKS.md, from benchmarks/results/memory-*.json."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.memory import predict
from benchmarks.record import newest

TEXT = """
## Predicted and measured memory of a training step

gpt-oss-20b's shape, stage 03's masked LoRA, each case in its own process. `card` is the device
memory of the process (torch's peak reserved memory and the CUDA context), `predicted` is the
prediction of this version's planner. `allocated` is the peak size of all tensors; the difference to
`card` is the context and the allocator's fragmentation. `kept` is what checkpointed layers keep for
the backward pass instead of recomputing it: outputs of full attention, or the experts' gate_up
outputs.
"""
COLUMNS = (
    *("layers", "tokens", "rank", "kept", "offloaded"),
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
        kept = [n for n in ("attention", "experts") if case.get(f"keep_{n}") == "always"]
        predicted, measured = predict(case).peak_bytes, figures["device_bytes"]
        cells = [
            f"{case['layers']}",
            f"{case['tokens']:,} × {case['batch']}",
            f"{case['rank']}",
            ", ".join(kept) or "nothing",
            "yes" if case["offload"] else "no",
            *(f"{n / 2**30:.2f} GiB" for n in (figures["allocated_bytes"], measured, predicted)),
            f"{predicted / measured - 1:+.1%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])
