"""The section on norms, rotary and the loss, from benchmarks/results/neighbours-*.json."""

from __future__ import annotations

from typing import Any

from benchmarks.record import newest

NEIGHBOURS = """
## Norms, rotary embedding, and the loss

The parts of a step other than attention and experts, in gpt-oss's shape, bf16: hidden size 2,880,
64 query and 8 KV heads of 64, vocabulary 201,088. `torch` is transformers' computation. GB/s count
the bytes that must move; the loss's TFLOP/s count its two products for the supervised tokens (ours
skips the others). The loss's peak is memory in addition to its inputs and their gradient.
"""


def write_section() -> str:
    """Return the section's text for all machines."""
    documents = newest("neighbours").items()
    return NEIGHBOURS + "".join(write_neighbours(machine, found) for machine, found in documents)


def write_neighbours(machine: str, document: dict[str, Any]) -> str:
    """Return the tables for one machine."""
    values = {
        (tuple(entry["case"].values()), entry["backend"], entry["metric"]): entry["value"]
        for entry in document["rows"]
    }
    cases = list(dict.fromkeys(key[0] for key in values))
    backends = {case: [b for c, b, m in values if c == case and m == "ms"] for case in cases}
    lines = [
        f"\n### {machine} (torch {document['versions']['torch']}, triton "
        f"{document['versions']['triton']}, {document['date']}, `{document['file']}`)\n",
        "| operation | pass | tokens | torch, ms (GB/s) | ours, ms (GB/s) | speed-up |",
        "|---" * 6 + "|",
    ]
    for case in (case for case in cases if case[0] != "loss"):
        cells, times = [], []
        for backend in ("torch", "ours"):
            times.append(values[case, backend, "ms"])
            cells.append(f"{times[-1]:.3f} ({values[case, backend, 'rate']:,.0f})")
        operation, direction, tokens = case
        cells = [operation, direction, f"{tokens:,}", *cells, f"{times[0] / times[1]:.1f} ×"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Loss and gradient:\n", "| tokens | supervised | | ms | TFLOP/s | peak, MiB |"]
    lines.append("|---" * 6 + "|")
    for case in (case for case in cases if case[0] == "loss"):
        for backend in backends[case]:
            ms, rate, peak = (values[case, backend, m] for m in ("ms", "rate", "peak_bytes"))
            cells = [f"{case[1]:,}", f"{case[2]:.0%}", backend, f"{ms:.1f}", f"{rate:.0f}"]
            lines.append("| " + " | ".join([*cells, f"{peak / 2**20:,.0f}"]) + " |")
    return "\n".join([*lines, ""])
