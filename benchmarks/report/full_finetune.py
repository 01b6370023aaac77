"""The section on sharded full fine-tuning, from benchmarks/results/full_finetune-*.json."""

from __future__ import annotations

from typing import Any

from benchmarks.record import newest

TEXT = """
## Training all parameters over several GPUs

`benchmarks/sharded_full.py`: a model of gpt-oss-20b's shape with fewer layers and random weights,
FSDP2 and DeepSpeed's ZeRO-3, a row a GPU. `difference` is the largest relative one between losses
and gradient norms of five steps on one GPU, which takes all rows, and on all of them. `tokens/s`
are those of one GPU, `peak` is what its allocator held; `-`: out of memory.
"""
NAMES = {"fsdp2": "FSDP2", "zero3": "ZeRO-3"}


def write_section() -> str:
    """Return the section's text for all machines; empty if there are no results."""
    documents = newest("full_finetune").items()
    text = "".join(_write_machine(machine, found) for machine, found in documents)
    return TEXT + text if text else ""


def _write_machine(machine: str, document: dict[str, Any]) -> str:
    differences: dict[str, tuple[int, float]] = {}
    speeds: dict[tuple[str, int, str, int], dict[str, float]] = {}
    for entry in document["rows"]:
        case, way, metric = entry["case"], entry["backend"], entry["metric"]
        if metric == "largest_difference":
            differences[way] = (case["layers"], entry["value"])
        elif "step" not in case:
            at = (way, case["tokens"], case["attention"], case["processes"])
            speeds.setdefault(at, {})[metric] = entry["value"]
    lines = [
        f"\n### {machine} (torch {document['versions']['torch']}, {document['date']}, "
        f"`{document['file']}`)\n",
        "| | layers | GPUs | tokens | attention | tokens/s | peak | difference |",
        "|---" * 8 + "|",
    ]
    for (way, tokens, attention, processes), found in speeds.items():
        layers, difference = differences[way]
        speed, peak = "-", "-"
        if "out_of_memory" not in found:
            speed, peak = f"{found['throughput']:,.0f}", f"{found['peak_bytes'] / 2**30:.1f} GiB"
        lines.append(
            f"| {NAMES[way]} | {layers} | {processes} | {tokens:,} | {attention} | {speed} | "
            f"{peak} | {difference:.0e} |"
        )
    return "\n".join([*lines, ""])
