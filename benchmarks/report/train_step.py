"""The training step's section of BENCHMARKS.md, from benchmarks/results/train_step*-*.json."""

from __future__ import annotations

import json
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.memory import kept_in
from benchmarks.record import RESULTS, newest

TEXT = """
## A training step in gpt-oss-20b's shape

Random weights in the published shapes; batch 1 except for 1,024 × 2; rank 16 on q, k, v and o;
gradient checkpointing; AdamW. A step is forward, backward and optimizer; speeds are the median of
three steps after two warm-up steps. `eager` and `flex` are transformers with PEFT and experts in
bf16 (grouped_mm). `lora` is the same adapter on this project's model (packed experts, its kernels).
`masked` is what stage 03 trains: LoRA through 2:4 int4 attention. GiB is the device memory of the
whole process, including the CUDA context. The run at 65,536 tokens kept its activation checkpoints
in host memory; it and the run at 1,024 × 2 recomputed attention in the backward pass. In the
profiles, routing, gather, gate and weighted sum of the experts count as elementwise in every arm,
and transformers' grouped products count as dense because their kernels are named like plain matrix
products.
"""
EXPERTS = """
`experts`, measured later, is `masked` with rank-8 adapters on both weights of every expert and
rank-16 adapters on the routers."""
ARMS = ("eager", "flex", "lora", "masked", "experts")
LONGEST = """
As stage 03's planner decides for a card of this size (`--planned`), one GPU, arm `masked`; `card`
is the process's GPU memory with the CUDA context, `host` its largest resident host memory:

| tokens | card capped at | experts | layers compute | card | predicted | host | step | tokens/s |
|---|---|---|---|---|---|---|---|---|"""
SUBJECTS = ("train_step_short", "train_step_capped", "train_step_long", "train_step_experts")


def write_section() -> str:
    """Return the section's text for all machines, and draw the plots in benchmarks/results."""
    text = TEXT
    others = [newest(subject) for subject in SUBJECTS]
    for machine, found in newest("train_step").items():
        documents = [found, *(other[machine] for other in others if machine in other)]
        text += write_machine(machine, documents)
    return text


def write_machine(machine: str, documents: list[dict[str, Any]]) -> str:
    """Return one machine's tables; a case in several documents is taken from the first."""
    values = {}
    for entry in (entry for document in documents for entry in document["rows"]):
        case = entry["case"]
        if case.get("keep_experts", "never") not in ("never", 0):
            continue  # shown in the sections on memory and on several GPUs
        key = (case["tokens"], case["batch"], case["cap_gib"], entry["backend"])
        values.setdefault(key, {}).setdefault(entry["metric"], entry["value"])
    versions = documents[0]["versions"]
    files = ", ".join(f"`{document['file']}`" for document in documents)
    arms = [arm for arm in ARMS if any(key[-1] == arm for key in values)]
    lines = [
        f"\n### {machine} (torch {versions['torch']}, transformers {versions['transformers']}, "
        f"{documents[0]['date']}, {files})\n",
        "| tokens | " + " | ".join(arms) + " |",
        "|---" * (1 + len(arms)) + "|",
    ]
    for tokens, batch, cap in sorted({k[:3] for k in values}, key=lambda k: (*k[:2], k[2] or 0)):
        rows = f" × {batch}" if batch > 1 else ""
        capped = f", card capped at {cap} GiB" if cap else ""
        cells = [show(values.get((tokens, batch, cap, arm))) for arm in arms]
        lines.append(f"| {tokens:,}{rows}{capped} | " + " | ".join(cells) + " |")
    lines += [EXPERTS] if "experts" in arms else []
    lines += profile_lines(values)
    for name, document in newest("train_step_planned").items():
        if name.startswith(machine):  # as h200 and h200host
            lines += planned_lines(document)
    if not any(k[1:3] == (1, None) and "throughput" in found for k, found in values.items()):
        return "\n".join([*lines, ""])
    plot = plot_throughput(machine, values)
    text = f"![training throughput on {machine}](benchmarks/results/{plot})"
    return "\n".join([*lines, "", text, ""])


def show(found: dict[str, float] | None) -> str:
    """Return a cell: tokens/s and GiB."""
    if found is None:
        return ""
    if "out_of_memory" in found:
        return "does not fit"
    return f"{found['throughput']:,.0f} tokens/s, {found['device_bytes'] / 2**30:.1f} GiB"


def planned_lines(document: dict[str, Any]) -> list[str]:
    """Return a table of the lengths whose layers compute as the planner decided."""
    cases: dict[str, dict[str, float]] = {}
    for entry in document["rows"]:
        cases.setdefault(json.dumps(entry["case"]), {})[entry["metric"]] = entry["value"]
    lines = [LONGEST]
    for text, found in cases.items():
        case = json.loads(text)
        rows = case["slice_rows"]
        way = ["all tokens at once" if rows == "never" else f"{int(rows):,} tokens at a time"]
        way += ["inputs in host memory"] if case["offload"] else []
        way += [f"attention {case['attention_backend']}"]
        way += [f"experts kept in {kept} layers"] if (kept := kept_in(case).experts) else []
        cells = [f"{case['tokens']:,}", f"{case['cap_gib']} GiB", case["placement"], ", ".join(way)]
        if "out_of_memory" in found:
            cells += ["does not fit", _gib(found["planned_bytes"]), "", "", ""]
        else:
            sizes = ("device_bytes", "planned_bytes", "host_peak_bytes")
            cells += [_gib(found[name]) for name in sizes]
            cells += [f"{found['step_seconds']:.2f} s", f"{found['throughput']:,.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, f"\nFrom `{document['file']}`."]


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def profile_lines(values: dict[tuple, dict[str, float]]) -> list[str]:
    """Return a table of a step's kernel time by kind, for the profiled cases."""
    lines = []
    for (tokens, *_, arm), found in sorted(values.items(), key=lambda item: str(item[0])):
        kinds = {k[12:]: v for k, v in found.items() if k.startswith("profile_ms: ")}
        if not kinds:
            continue
        if not lines:
            lines = ["", "Kernel time of one step, ms (share):\n", "| tokens | arm | kernels |"]
            lines += ["|---|---|---|"]
        total = sum(kinds.values())
        parts = [f"{k} {v:,.0f} ({v / total:.0%})" for k, v in sorted(kinds.items())]
        lines.append(f"| {tokens:,} | {arm} | {'; '.join(parts)}; all {total:,.0f} |")
    return lines


def plot_throughput(machine: str, values: dict[tuple, dict[str, float]]) -> str:
    """Plot tokens per second by length; return the plot's file name."""
    figure, axis = plt.subplots(figsize=(6, 3.6))
    for arm in ARMS:
        points = sorted(
            (tokens, found["throughput"])
            for (tokens, *rest, name), found in values.items()
            if name == arm and rest == [1, None] and "throughput" in found
        )
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", label=arm)
    axis.set(xscale="log", ylim=(0, None), xlabel="tokens", ylabel="tokens/s on one GPU")
    lengths = sorted({tokens for tokens, *rest, _ in values if rest == [1, None]})
    axis.set_xticks(lengths, [f"{tokens:,}" for tokens in lengths])
    axis.minorticks_off()
    axis.set_title(f"training step, gpt-oss-20b's shape, {machine}", fontsize=10)
    axis.legend(fontsize=8)
    figure.tight_layout()
    name = f"train_step-{machine}.png"
    figure.savefig(RESULTS / name, dpi=80)
    return name
