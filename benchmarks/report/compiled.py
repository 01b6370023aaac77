"""The section on torch.compile, from benchmarks/results/compiled-*.json; empty without results."""

from __future__ import annotations

from typing import Any

from benchmarks.record import newest

TEXT = """
## Under torch.compile

A few layers in gpt-oss-20b's widths with LoRA on attention, without gradient checkpointing:
`torch.compile(model, fullgraph=True)` beside the same model without it. A step is forward, backward
and optimizer, the median after the warm-up. Lengths are in the order of their first steps, in one
process; `graphs` were compiled in a length's first step, whose seconds include that.
"""
HEAD = (
    "| layers | tokens | step, s | compiled, s | speed-up | GiB | compiled, GiB | compiled: first "
    "step, s | graphs | breaks | difference of the first loss, nats |"
)


def write_section() -> str:
    """Return the section's text for all machines."""
    documents = newest("compiled").items()
    return "".join([TEXT, *(write_machine(*each) for each in documents)]) if documents else ""


def write_machine(machine: str, document: dict[str, Any]) -> str:
    """Return one machine's table."""
    cases: dict[tuple[int, int], dict[tuple[str, str], float]] = {}
    for entry in document["rows"]:
        case = entry["case"]["layers"], entry["case"]["tokens"]
        cases.setdefault(case, {})[entry["backend"], entry["metric"]] = entry["value"]
    versions = document["versions"]
    lines = [
        f"\n### {machine} (torch {versions['torch']}, transformers {versions['transformers']}, "
        f"{document['date']}, `{document['file']}`)\n",
        HEAD,
        "|---" * 11 + "|",
    ]
    for (layers, tokens), found in cases.items():
        direct, compiled = (found[arm, "step_seconds"] for arm in ("eager", "compiled"))
        sizes = (found[arm, "allocated_bytes"] / 2**30 for arm in ("eager", "compiled"))
        cells = [f"{layers}", f"{tokens:,}", f"{direct:.3f}", f"{compiled:.3f}"]
        cells += [f"{direct / compiled:.2f} ×", *(f"{size:.2f}" for size in sizes)]
        cells += [f"{found['compiled', 'first_step_seconds']:.1f}"]
        cells += [f"{found['compiled', name]:.0f}" for name in ("graphs", "breaks")]
        cells += [f"{found['compiled', 'loss_difference']:.1e}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])
