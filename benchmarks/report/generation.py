"""The section on generation, from benchmarks/results/generation-*.json."""

from __future__ import annotations

from typing import Any

from benchmarks.record import newest

HEAD = """
## Generation at batch 1

gpt-oss-20b's shape with random weights in stage 02's formats (experts MXFP4, attention int4 2:4).
The bound is the rate at which the GPU's memory, at its data sheet bandwidth, can read once every
packed weight that a token needs. `graph` is this project's `generate`, `kernels` the same step
launched kernel by kernel, `packed` transformers' `generate` over the packed model. Device memory is
the peak after loading: memory reserved by torch's allocator, and the CUDA context with kernels,
streams and the graph. Loading here means building random weights.
"""
EAGER = "\n`eager` is transformers' `generate` over bf16 weights.\n"


def write_section() -> str:
    """Return the section's text for all machines; empty if there are no results."""
    found = newest("generation").items()
    tables = "".join(write_machine(machine, document) for machine, document in found)
    return HEAD + tables if tables else ""


def write_machine(machine: str, document: dict[str, Any]) -> str:
    """Return one machine's table, and the kernel times of a step."""
    values = {(row["backend"], row["metric"]): row["value"] for row in document["rows"]}
    arms = list(dict.fromkeys(row["backend"] for row in document["rows"]))
    case, versions = document["rows"][0]["case"], document["versions"]
    lines = [
        f"\n### {machine} (torch {versions['torch']}, triton {versions['triton']}, "
        f"{document['date']}, `{document['file']}`)\n",
        f"A prompt of {case['prompt']:,} tokens, {case['tokens']} generated.\n",
        "| arm | tokens/s | share of the bound | first token, ms | load, s | device memory, GiB |",
        "|---|---|---|---|---|---|",
    ]
    for arm in arms:
        share = values.get((arm, "share_of_bound"))
        cells = [
            arm,
            f"{values[arm, 'throughput']:,.0f}",
            "–" if share is None else f"{share:.1%}",
            f"{values[arm, 'first_token_seconds'] * 1e3:.0f}",
            f"{values[arm, 'load_seconds']:.1f}",
            f"{values[arm, 'device_bytes'] / 2**30:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [EAGER] if "eager" in arms else []
    if ("graph", "sampled_throughput") in values:
        lines.append(
            f"\nSampled with top-p, `graph` makes {values['graph', 'sampled_throughput']:,.0f} "
            "tokens/s. The first token of a second turn after a known prefix takes "
            f"{values['graph', 'turn_first_token_seconds'] * 1e3:.0f} ms, that of a prompt of the "
            f"turn's new tokens alone {values['graph', 'tail_first_token_seconds'] * 1e3:.0f} ms."
        )
    kernels = {
        metric.removeprefix("kernel_us: "): value
        for (arm, metric), value in values.items()
        if arm == "graph" and metric.startswith("kernel_us: ")
    }
    if kernels:
        spent = ", ".join(f"{name} {us:,.0f}" for name, us in kernels.items())
        lines.append(
            f"\nA replayed step takes {values['graph', 'step_ms']:.3f} ms on the device. Its "
            f"kernels, some of which overlap, take (in µs): {spent}."
        )
    return "\n".join([*lines, ""])
