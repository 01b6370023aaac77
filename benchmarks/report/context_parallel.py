"""The section on one sequence over several GPUs, from results/context_parallel-*.json."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.record import newest

TEXT = """
## One sequence over several GPUs

Attention: forward and backward of one layer in gpt-oss's shape, one document, bf16, sinks frozen;
device time, the slowest rank's median. MB is the volume that the busiest rank passes to
collectives. Balance is the slowest rank's compute time divided by the mean. `contiguous` gathers
all keys for contiguous shards (llama3-style), `ulysses` exchanges tokens for heads; both use this
project's attention kernels unless a backend is named. Steps: gpt-oss-20b's shape with all experts
on every GPU, including sharding, forward, backward, reduction of gradients and optimizer. Full
layers gather all eight KV heads at once unless a stride is named (`heads_k_stride` 8; the shipped
configs use 4). GiB is the memory that torch reserved; the CUDA context takes 0.8 more. Peer access
off is `NCCL_P2P_DISABLE=1`. `experts kept` keeps the gate_up output of every layer's experts for
the backward pass, as stage 03 does if memory allows (`training.keep_experts: auto`). `h200x4` was
measured before shards used cuDNN attention and the current exchange of keys, `h200x2` after.
"""
CARD_GIB, CONTEXT_GIB = 23.6, 0.8
WITHIN = """
### Steps within {card} GiB a GPU, CUDA context included

The fastest runs above, with peer access, that would fit on a 24 GB card. A single GPU cannot keep
the experts' gate_up outputs for 16,384 tokens; four can. NCCL's buffers are not counted.
"""


def write_section() -> str:
    """Return the section's text for all machines; empty if there are no results."""
    found = newest("context_parallel")
    parts = [write_machine(machine, document) for machine, document in found.items()]
    return TEXT + "".join(parts) + write_within(found) if parts else ""


def write_within(documents: dict[str, dict[str, Any]]) -> str:
    """Return a table of the fastest runs that fit on a 24 GB card, by arm and number of GPUs."""
    fastest: dict[tuple, dict[str, float]] = {}
    for document in documents.values():
        for (arm, tokens, degree, peer), found in collect_steps(document).items():
            at = (arm.split(",")[0], tokens, degree, peer)
            gib = found.get("reserved_bytes", math.inf) / 2**30 + CONTEXT_GIB
            best = fastest.get(at, {}).get("throughput", 0.0)
            if peer and gib <= CARD_GIB and found["throughput"] > best:
                fastest[at] = found
    return "\n".join([WITHIN.format(card=CARD_GIB), *step_lines(fastest), ""])


def collect_steps(document: dict[str, Any]) -> dict[tuple, dict[str, float]]:
    """Return each metric's value by (arm, tokens, GPUs, peer access)."""
    steps: dict[tuple, dict[str, float]] = {}
    for entry in document["rows"]:
        case = entry["case"]
        if case["part"] == "step":
            kept = ", experts kept" if case.get("keep_experts") == "always" else ""
            key = (case["arm"] + kept, case["tokens"], case["degree"], case["peer"])
            steps.setdefault(key, {})[entry["metric"]] = entry["value"]
    return steps


def write_machine(machine: str, document: dict[str, Any]) -> str:
    """Return one machine's tables of steps and attention."""
    steps = collect_steps(document)
    attention: dict[tuple, dict[str, float]] = {}
    for entry in document["rows"]:
        case, name = entry["case"], entry["backend"]
        if case["part"] == "attention":
            key = (case["kind"], case["degree"], case["peer"], name)
            attention.setdefault(key, {})[entry["metric"]] = entry["value"]
    versions = document["versions"]
    head = (
        f"\n### {machine} (torch {versions['torch']}, {document['date']}, `{document['file']}`)\n"
    )
    of_attention = attention_lines(attention) if attention else []
    return "\n".join([head, *step_lines(steps), *of_attention, ""])


def step_lines(steps: dict[tuple, dict[str, float]]) -> list[str]:
    """Return a table of tokens per second by degree and length, with scaling."""
    lines = [
        "| arm | tokens | GPUs | peer access | tokens/s | GiB a GPU | attention, MB | growth |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, found in sorted(steps.items()):
        arm, tokens, degree, peer = key
        if "out_of_memory" in found:
            lines.append(f"| {arm} | {tokens:,} | {degree} | | does not fit | | | |")
            continue
        lines.append(
            f"| {arm} | {tokens:,} | {degree} | {'on' if peer else 'off'} | "
            f"{found['throughput']:,.0f} | {found['reserved_bytes'] / 2**30:.1f} | "
            f"{found['attention_sent_bytes'] / 1e6:,.0f} | {growth(key, steps)} |"
        )
    return [*lines, ""]


def growth(key: tuple, steps: dict[tuple, dict[str, float]]) -> str:
    """Return the speed relative to one GPU, with the same tokens per GPU and the same length."""
    arm, tokens, degree, _ = key
    if degree == 1:
        return ""
    parts, rate = [], steps[key]["throughput"]
    each = steps.get((arm, tokens // degree, 1, True), {}).get("throughput")
    same = steps.get((arm, tokens, 1, True), {}).get("throughput")
    if each:
        parts.append(f"{rate / each:.2f}× of one GPU at {tokens // degree:,}")
    if same:
        parts.append(f"efficiency {rate / same / degree:.2f} at equal length")
    return "; ".join(parts)


def attention_lines(attention: dict[tuple, dict[str, float]]) -> list[str]:
    """Return a table of every arm's time, bytes and balance, and its speed-up over contiguous."""
    lines = [
        "| attention | GPUs | peer access | ms | MB sent | balance | against contiguous |",
        "|---|---|---|---|---|---|---|",
    ]
    for (kind, degree, peer, name), found in sorted(attention.items()):
        if "wrong" in found:
            lines.append(f"| {kind}, {name} | {degree} | | wrong result, not timed | | | |")
            continue
        base = attention.get((kind, degree, peer, "contiguous"), {}).get("forward_backward_ms")
        against = f"{base / found['forward_backward_ms']:.2f}×" if base else ""
        lines.append(
            f"| {kind}, {name} | {degree} | {'on' if peer else 'off'} | "
            f"{found['forward_backward_ms']:.3f} | {found['sent_bytes'] / 1e6:.2f} | "
            f"{found['balance']:.2f} | {against} |"
        )
    return lines
