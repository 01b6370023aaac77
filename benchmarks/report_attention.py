"""The attention section of BENCHMARKS.md, from benchmarks/results/attention-*.json."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt

from benchmarks.record import RESULTS, newest

ATTENTION = """
## Attention with sinks

gpt-oss's shape (64 query heads, 8 KV heads, head_dim 64), bf16, batch 1, sinks frozen as under
LoRA; medians in ms, TFLOP/s on the FLOPs that the mask leaves. Packed: documents of 1,024 tokens on
average. A backend that errs more than twice as much as torch's FlashAttention-2 with the sink
correction has no speed here. `chosen` is what `attention(...)` takes by itself.
"""


def write_section() -> str:
    """The section's text, machine by machine; the plots are written beside the results."""
    documents = newest("attention").items()
    return ATTENTION + "".join(write_attention(machine, found) for machine, found in documents)


def lookup(document: dict[str, Any]) -> dict[tuple, float]:
    """Values by (kind, packed, tokens, backend, metric), training cases only."""
    values = {}
    for entry in document["rows"]:
        case = entry["case"]
        if "queries" not in case:
            key = (case["kind"], case["packed"], case["tokens"], entry["backend"], entry["metric"])
            values[key] = entry["value"]
    return values


def write_attention(machine: str, document: dict[str, Any]) -> str:
    """The section's tables for one machine, and the plot beside them."""
    values = lookup(document)
    cases = sorted({key[:3] for key in values if key[4] == "forward_backward_ms"})
    backends = sorted({key[3] for key in values if key[4] == "forward_backward_ms"})
    lines = [
        f"\n### {machine} (torch {document['versions']['torch']}, triton "
        f"{document['versions']['triton']}, {document['date']}, `{document['file']}`)\n",
        "Forward + backward, ms (TFLOP/s); forward alone, ms; peak memory of forward + backward:\n",
        "| layer | tokens | " + " | ".join(backends) + " |",
        "|---" * (2 + len(backends)) + "|",
    ]
    for kind, packed, tokens in cases:
        cells = [f"{kind}{', packed' if packed else ''}", f"{tokens:,}"]
        for backend in backends:
            at = (kind, packed, tokens, backend)
            if (*at, "forward_backward_ms") not in values:
                cells.append("")
                continue
            both, rate, forward, peak = (
                values[*at, metric]
                for metric in (
                    "forward_backward_ms",
                    "forward_backward_rate",
                    "forward_ms",
                    "forward_backward_peak_bytes",
                )
            )
            cells.append(f"{both:.2f} ({rate:.0f}); {forward:.2f}; {peak / 2**20:,.0f} MiB")
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Relative L2 error against fp64 at 2,048 tokens:\n"]
    names = ("out", "dq", "dk", "dv", "dsinks")
    lines += ["| layer | backend | " + " | ".join(names) + " |", "|---" * 7 + "|"]
    for key in sorted(key for key in values if key[4] == "relative_error_out"):
        errors = (values[*key[:4], f"relative_error_{name}"] for name in names)
        lines.append(f"| {key[0]} | {key[3]} | " + " | ".join(f"{e:.1e}" for e in errors) + " |")
    plot = plot_attention(machine, values, backends)
    return "\n".join([*lines, "", f"![attention on {machine}](benchmarks/results/{plot})", ""])


def plot_attention(machine: str, values: dict[tuple, float], backends: list[str]) -> str:
    """Rate by length, one panel a layer kind and packing; the picture's file name."""
    panels = [("full", False), ("full", True), ("window", False), ("window", True)]
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.4))
    for axis, (kind, packed) in zip(axes, panels, strict=True):
        for backend in backends:
            wanted = (kind, packed, backend, "forward_backward_rate")
            points = sorted((k[2], v) for k, v in values.items() if (*k[:2], *k[3:]) == wanted)
            if points and backend != "chosen":
                axis.plot(*zip(*points, strict=True), marker="o", label=backend)
        axis.set(xscale="log", ylim=(0, None), xlabel="tokens")
        axis.set_title(f"{kind}, {'packed' if packed else 'one document'}", fontsize=10)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("TFLOP/s, forward + backward")
    figure.tight_layout()
    name = f"attention-{machine}.png"
    figure.savefig(RESULTS / name, dpi=80)
    return name
