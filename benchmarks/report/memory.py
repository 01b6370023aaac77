"""The memory section of BENCHMARKS.md, from benchmarks/results/memory-*.json."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.memory import predict
from benchmarks.record import newest

TEXT = """
## Predicted and measured memory of a training step

gpt-oss-20b's shape, stage 03's masked LoRA, each case in a process of its own. `card` is the device
memory of the process (torch's reserved memory at its peak, and the CUDA context), `predicted` what
this version's planner says. `allocated` is what tensors took; the difference to `card` is the
context and the allocator's fragmentation. `kept` names what a checkpointed layer keeps for the
backward pass instead of recomputing it: full attention's outputs, or the experts' first product.
"""
COLUMNS = ("layers", "tokens", "rank", "kept", "offloaded", "allocated", "card", "predicted", "off")


def write_section() -> str:
    """The section's text, machine by machine; empty where nothing was measured."""
    found = newest("memory")
    if not found:
        return ""
    return TEXT + "".join(write_machine(machine, found[machine]) for machine in found)


def write_machine(machine: str, document: dict[str, Any]) -> str:
    """A row for each case."""
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
