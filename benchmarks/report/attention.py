"""The attention section of BENCHMARKS.md, from benchmarks/results/attention-*.json."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.record import RESULTS, newest
from benchmarks.report.notes import list_notes

ATTENTION = """
## Attention with sinks

gpt-oss's shape (64 query heads, 8 KV heads, head_dim 64), bf16, batch 1, sinks frozen as under
LoRA; median device time in ms, backends timed alternately; TFLOP/s count the FLOPs that the mask
leaves. Packed: documents of 1,024 tokens on average. `chosen` is the backend that `attention(...)`
selects by default. A backend of ours is listed only if its error is at most twice that of torch's
FlashAttention-2 with the sink correction (`torch_flash`). `eager` (transformers' definition, in
bf16) and `flex` (torch's, with sinks applied through its log-sum-exp) are listed only if their
error is at most twice that of `eager`.
"""
NAMES = ("out", "dq", "dk", "dv", "dsinks")
Values = dict[tuple, float]


def write_section() -> str:
    """Return the section's text for all machines, and draw the plots in benchmarks/results."""
    documents = newest("attention").items()
    return ATTENTION + "".join(write_attention(machine, found) for machine, found in documents)


def lookup(document: dict[str, Any], *beside: str) -> Values:
    """Return values by (kind, packed, tokens, *beside, backend, metric) of matching cases."""
    keys = ("kind", "packed", "tokens", *beside)
    return {
        (*(row["case"][key] for key in keys), row["backend"], row["metric"]): row["value"]
        for row in document["rows"]
        if set(row["case"]) == set(keys)
    }


def write_attention(machine: str, document: dict[str, Any]) -> str:
    """Return the section's tables for one machine, and draw its plot."""
    values = lookup(document)
    head = (
        f"\n### {machine} (torch {document['versions']['torch']}, triton "
        f"{document['versions']['triton']}, {document['date']}, `{document['file']}`)\n"
    )
    plot = plot_attention(machine, values)
    lines = [
        head,
        f"![attention on {machine}](benchmarks/results/{plot})\n",
        *tabulate_speed(values),
        *tabulate_ratios(values),
        *tabulate_errors(values),
        *tabulate_decoding(lookup(document, "queries")),
        *tabulate_determinism(document),
        *tabulate_first_calls(lookup(document, "process")),
        *list_notes(document["rows"]),
    ]
    return "\n".join(lines) + "\n"


def table(*head: str) -> list[str]:
    """Return the first two lines of a table."""
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]


def name_layer(kind: str, packed: bool) -> str:
    """Return the name of a layer's kind and packing."""
    return f"{kind}{', packed' if packed else ''}"


def list_backends(values: Values) -> list[str]:
    """Return the backends that were timed."""
    return sorted({key[-2] for key in values if key[-1] == "forward_backward_ms"})


def tabulate_speed(values: Values) -> Iterator[str]:
    """Yield the lines of the table of times, rates and peak memory."""
    backends = list_backends(values)
    yield "Forward + backward, ms (TFLOP/s); forward, ms; peak memory of forward + backward:\n"
    yield from table("layer", "tokens", *backends)
    for kind, packed, tokens in sorted({k[:3] for k in values if k[-1] == "forward_backward_ms"}):
        cells = []
        for backend in backends:
            at = (kind, packed, tokens, backend)
            if (*at, "forward_backward_ms") not in values:
                cells.append("")
                continue
            both, rate = values[*at, "forward_backward_ms"], values[*at, "forward_backward_rate"]
            forward, peak = values[*at, "forward_ms"], values[*at, "forward_backward_peak_bytes"]
            cells.append(f"{both:.2f} ({rate:.0f}); {forward:.2f}; {peak / 2**20:,.0f} MiB")
        yield "| " + " | ".join([name_layer(kind, packed), f"{tokens:,}", *cells]) + " |"


def tabulate_ratios(values: Values) -> Iterator[str]:
    """Yield the lines of the table of speed-ups, at each length that both backends have."""
    both = "forward_backward_ms"
    comparisons = [
        (f"{label}, {kind} layer", (kind, False, other), (kind, False, backend), both)
        for label, kind, other, backend in (
            ("chosen against torch_cudnn", "full", "torch_cudnn", "chosen"),
            ("chosen against flash_attn_4", "full", "flash_attn_4", "chosen"),
            ("triton against torch_flash", "full", "torch_flash", "triton"),
            ("triton against torch_flash", "window", "torch_flash", "triton"),
            ("triton against flex", "window", "flex", "triton"),
            ("chosen against eager", "full", "eager", "chosen"),
            ("chosen against eager", "window", "eager", "chosen"),
        )
    ]
    rate = "forward_backward_rate"
    comparisons += [
        ("useful FLOP/s packed against one document, both triton",
         ("full", True, "triton"), ("full", False, "triton"), rate),
        ("useful FLOP/s packed against one document, both chosen",
         ("full", True, "chosen"), ("full", False, "chosen"), rate),
    ]  # fmt: skip
    lengths = sorted({key[2] for key in values if key[-1] == both})
    yield "\nSpeed-up, forward + backward:\n"
    yield from table("", *(f"{tokens:,}" for tokens in lengths))
    for label, above, below, metric in comparisons:
        cells = []
        for tokens in lengths:
            pair = [(k, p, tokens, b, metric) for k, p, b in (above, below)]
            known = all(key in values for key in pair)
            cells.append(f"{values[pair[0]] / values[pair[1]]:.2f}" if known else "")
        if any(cells):
            yield "| " + " | ".join([label, *cells]) + " |"


def tabulate_errors(values: Values) -> Iterator[str]:
    """Yield the lines of the table of errors."""
    yield "\nRelative L2 error against fp64 at 2,048 tokens:\n"
    yield from table("layer", "backend", *NAMES)
    for key in sorted(key for key in values if key[-1] == "relative_error_out"):
        errors = (values[*key[:4], f"relative_error_{name}"] for name in NAMES)
        yield f"| {key[0]} | {key[3]} | " + " | ".join(f"{e:.1e}" for e in errors) + " |"


def tabulate_decoding(values: Values) -> Iterator[str]:
    """Yield the lines of the table of decoding times."""
    cases = sorted({key[:4] for key in values})
    if not cases:
        return
    backends = sorted({key[4] for key in values})
    yield "\nDecoding, a few queries over a cache: device time in µs (wall time per call in µs):\n"
    yield from table("layer", "keys", "queries", *backends)
    for case in cases:
        cells = [
            f"{values[*case, name, 'forward_ms'] * 1e3:.0f} "
            f"({values[*case, name, 'forward_wall_ms'] * 1e3:.0f})"
            if (*case, name, "forward_wall_ms") in values
            else ""
            for name in backends
        ]
        yield "| " + " | ".join([case[0], f"{case[2]:,}", str(case[3]), *cells]) + " |"


def tabulate_determinism(document: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the tables of deterministic and nondeterministic times."""
    rows = [row for row in document["rows"] if "deterministic" in row["case"]]
    for backend in dict.fromkeys(row["backend"] for row in rows):
        yield (
            f"\n{backend}, ms, without and with `deterministic: true` (the Triton kernels are "
            "always deterministic):\n"
        )
        yield from table("layer", "tokens", "without", "with")
        for kind in ("full", "window"):
            own = {
                r["case"]["deterministic"]: r
                for r in rows
                if (r["backend"], r["case"]["kind"]) == (backend, kind)
            }
            tokens = own[True]["case"]["tokens"]
            yield f"| {kind} | {tokens:,} | {own[False]['value']:.2f} | {own[True]['value']:.2f} |"


def tabulate_first_calls(values: Values) -> Iterator[str]:
    """Yield the lines of the table of first calls."""
    if not values:
        return
    what = (("first", True), ("first", False), ("later", True))
    lengths = sorted({key[2] for key in values})
    yield (
        "\nFirst forward + backward, in seconds (number of compiled Triton kernels): with an empty "
        "cache, at another length, and in a later process:\n"
    )
    yield from table("layer", "backend", "first call", "another length", "later process")
    for kind, packed, backend in sorted({(k[0], k[1], k[4]) for k in values}):
        cells = []
        for process, first in what:
            at = (kind, packed, lengths[0 if first else -1], process, backend)
            seconds = values[*at, "first_call_seconds"]
            compiled = values[*at, "first_call_compiled_kernels"]
            cells.append(f"{seconds:.2f} ({compiled:.0f})")
        yield "| " + " | ".join([name_layer(kind, packed), backend, *cells]) + " |"


def plot_attention(machine: str, values: Values) -> str:
    """Plot the rate by length, one panel per kind and packing; return the plot's file name."""
    panels = [("full", False), ("full", True), ("window", False), ("window", True)]
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.4))
    for axis, (kind, packed) in zip(axes, panels, strict=True):
        for backend in list_backends(values):
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
