"""The section on Liger's kernels, from benchmarks/results/liger-*.json."""

from __future__ import annotations

from typing import Any

from benchmarks.record import newest

LIGER = """
## Liger's kernels beside ours

gpt-oss-20b's widths, bf16. Relative L2 errors against fp32 of the output and of the inputs'
gradients; median ms. `torch` is transformers' computation. `Liger` is what `use_liger_kernel`
installs; `Liger, fp32` its norm with gpt-oss's rounding. An arm whose error is more than twice
torch's computes another function, and is not timed. Of the activation only the error is of
interest: Liger's SwiGLU neither clamps nor scales, as gpt-oss's does.
"""
METRICS = {"error_out": ".1e", "error_gradients": ".1e", "forward_ms": ".3f",
           "forward_backward_ms": ".3f"}  # fmt: skip


def write_section() -> str:
    """Return the section's text for all machines; nothing if none has been measured."""
    documents = newest("liger").items()
    text = "".join(write_liger(machine, found) for machine, found in documents)
    return LIGER + text if text else ""


def write_liger(machine: str, document: dict[str, Any]) -> str:
    """Return the table for one machine."""
    values: dict[tuple, dict[str, float]] = {}
    for entry in document["rows"]:
        at = (entry["case"]["operation"], entry["case"]["tokens"], entry["backend"])
        values.setdefault(at, {})[entry["metric"]] = entry["value"]
    lines = [
        f"\n### {machine} (torch {document['versions']['torch']}, triton "
        f"{document['versions']['triton']}, {document['date']}, `{document['file']}`)\n",
        "| operation | tokens | | error, out | error, gradients | forward | forward + backward |",
        "|---" * 7 + "|",
    ]
    for (operation, tokens, backend), found in values.items():
        cells = [format(found[m], form) if m in found else "" for m, form in METRICS.items()]
        lines.append("| " + " | ".join([operation, f"{tokens:,}", backend, *cells]) + " |")
    return "\n".join([*lines, ""])
