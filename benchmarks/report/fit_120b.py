"""The section on gpt-oss-120b's shape over several GPUs, from results/fit_120b-*.json."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.fit_120b import plan
from benchmarks.record import newest
from benchmarks.report.figures import group_by_case

TEXT = """
## gpt-oss-120b on several 24 GB cards

Training steps with experts and vocabulary shared by all GPUs, which may use 23.6 GiB each. `whole`
is the exact shape on four GPUs; `half` puts the same weights, tokens and rows per expert on each of
two. Random weights; `masked` trains LoRA r 16 through 2:4 int4 attention, `experts` also r 8 on
every expert in bf16 with 8-bit AdamW. `SP` GPUs share a sequence. Figures are those of the worst
GPU. `card` is its memory with the CUDA context and NCCL's buffers, `predicted` this version's plan.
Shares are of the arithmetic limit of an H200 at 16,384 tokens, 23,774 tokens/s a GPU: of `kernels`
by the time in which any kernel but NCCL's runs, of `step` by wall time. `null` is the host's time
for launching an empty kernel. An exchange is hidden while its kernel runs beside another. NCCL's
kernels also wait for the other GPUs: `transfers` are those of the GPU that comes last to each
exchange. Peer access off is `NCCL_P2P_DISABLE=1`. A part of a GPU is that share of its
multiprocessors, all of its memory and bandwidth: with a quarter, its kernels and not the host set
the pace, as on a smaller card. CUDA's Multi-Process Service limits them; it holds most of the
context, which the plan counts.
"""
HOST_TEXT = """
Experts in page-locked host memory: a step, the same step with the copies left out (its kernels read
random weights of whatever layers the two buffers hold), and a step's copies by themselves, in one
run. Slower copies come in pieces of 128 MiB with a wait after each; the rate is what the copies
reached by themselves. `host` is a process's largest resident memory, and in parentheses what of it
is not experts.
"""
MEMORY = ("card", "predicted", "error", "weights", "torch", "context", "NCCL")
SPEED = ("tokens/s", "step", "step, share", "kernels", "kernels, share", "launches a layer", "null")
BYTES = ("sent", "by experts", "NCCL's kernels", "hidden", "transfers", "hidden")
HOST = ("copies", "step", "compute alone", "copies alone", "step / longest", "step / copies",
        "copied", "rate", "tokens/s", "host")  # fmt: skip
CASE = ("shape", "arm", "tokens", "GPUs", "SP", "peer access")


def write_section() -> str:
    """Return the section's text for all machines; empty if there are no results."""
    found = newest("fit_120b")
    if not found:
        return ""
    return TEXT + "".join(write_machine(machine, found[machine]) for machine in found)


def write_machine(machine: str, document: dict[str, Any]) -> str:
    """Return one machine's tables of memory, speed and exchanges, with a row for each case."""
    cases = group_by_case(document)
    whole = {text: found for text, found in cases.items() if "device_bytes" in found}
    head = (
        f"\n### {machine} (torch {document['versions']['torch']}, {document['date']}, "
        f"`{document['file']}`)"
    )
    lines = [head]
    tables = ((MEMORY, show_memory), (SPEED, show_speed), (BYTES, show_exchanges))
    for columns, show in tables if whole else ():
        lines += ["", "| " + " | ".join((*CASE, *columns)) + " |"]
        lines.append("|---" * len(CASE + columns) + "|")
        for text, found in whole.items():
            case = json.loads(text)
            lines.append("| " + " | ".join((*name_case(case), *show(case, found))) + " |")
    lines += write_host(cases)
    lines += [
        f"\nNot enough memory: {', '.join(name_case(json.loads(text)))}."
        for text, found in cases.items()
        if "out_of_memory" in found
    ]
    return "\n".join([*lines, ""])


def write_host(cases: dict[str, dict[str, float]]) -> list[str]:
    """Return the table of steps with experts in host memory, and what was compared."""
    streamed = {text: found for text, found in cases.items() if "copies_alone_seconds" in found}
    lines = []
    if streamed:
        lines += [HOST_TEXT, "| " + " | ".join((*CASE, *HOST)) + " |"]
        lines.append("|---" * len(CASE + HOST) + "|")
    for text, found in streamed.items():
        case = json.loads(text)
        lines.append("| " + " | ".join((*name_case(case), *show_host(case, found))) + " |")
    for text, found in cases.items():
        case = json.loads(text)
        name = ", ".join(name_case(case))
        if "unchanged_tensors" in found:
            count = f"{found['unchanged_tensors']:.0f}"
            lines.append(f"\n{name}: after all steps, {count} tensors of experts hash as before.")
        if "tensors_equal" in found:
            equal, all_of = (f"{found[f'tensors_{key}']:.0f}" for key in ("equal", "compared"))
            lines.append(
                f"\n{name}, {case['layers']} layers: {equal} of {all_of} losses and gradients are "
                f"the same bits as with experts on the GPU; {found['tensors_repeated']:.0f} are in "
                "two runs with these."
            )
    return lines


def show_host(case: dict[str, Any], found: dict[str, float]) -> list[str]:
    """Return the cells of a case with experts in host memory."""
    limit = case["copy_limit"]
    peak, rest = (found.get(f"host_{name}_bytes") for name in ("peak", "rest"))
    return [
        "as fast as they go" if limit is None else f"at most {limit / 1e9:g} GB/s",
        f"{found['streamed_step_seconds']:.3f} s",
        f"{found['compute_alone_seconds']:.3f} s",
        f"{found['copies_alone_seconds']:.3f} s",
        f"{found['over_longest']:.2f}",
        f"{found['over_copies']:.2f}",
        f"{found['copied_bytes'] / 1e9:.1f} GB",
        f"{found['copies_rate'] / 1e9:.1f} GB/s",
        f"{found['streamed_throughput']:,.0f}",
        "" if peak is None or rest is None else f"{_gib(peak)} ({_gib(rest)})",
    ]


def name_case(case: dict[str, Any]) -> tuple[str, ...]:
    """Return a case's cells; the first results have all multiprocessors."""
    part = case.get("multiprocessors", 100)
    return (
        case["shape"],
        case["arm"],
        f"{case['tokens']:,}",
        f"{case['gpus']}"
        + (f", {part} % of each" if part < 100 else "")
        + (", experts on the host" if case.get("placement") == "host" else ""),
        f"{degree_of(case)}",
        "on" if case["peer"] else "off",
    )


def degree_of(case: dict[str, Any]) -> int:
    """Return how many GPUs share a sequence; the first results have all of them do."""
    return case.get("degree", case["gpus"])


def show_memory(case: dict[str, Any], found: dict[str, float]) -> list[str]:
    """Return the cells of a case's memory."""
    predicted = plan(case | {"degree": degree_of(case)})["planned_bytes"]
    card = found["device_bytes"]
    names = ("weight_bytes", "reserved_bytes", "context_bytes", "nccl_bytes")
    return [
        _gib(card),
        _gib(predicted),
        f"{predicted / card - 1:+.1%}",
        *(_gib(found[name]) for name in names),
    ]


def show_speed(case: dict[str, Any], found: dict[str, float]) -> list[str]:
    """Return the cells of a case's speed."""
    return [
        f"{found['throughput']:,.0f}",
        f"{found['step_seconds']:.3f} s",
        f"{found['step_share_of_limit']:.0%}",
        f"{found['compute_seconds']:.3f} s",
        f"{found['compute_share_of_limit']:.0%}",
        f"{found['launches_per_layer']:.0f}",
        f"{found['launch_seconds'] * 1e6:.1f} µs",
    ]


def show_exchanges(case: dict[str, Any], found: dict[str, float]) -> list[str]:
    """Return the cells of a case's exchanges."""
    experts = sum(size for name, size in found.items() if name.startswith("sent_bytes: expert"))
    return [
        f"{found['sent_bytes'] / 1e9:.1f} GB",
        f"{experts / 1e9:.1f} GB",
        f"{found['collective_seconds']:.3f} s",
        f"{found['hidden_share']:.0%}",
        *_transfers(found),
    ]


def _transfers(found: dict[str, float]) -> list[str]:
    """Return the cells of the transfers alone; the first results do not have them."""
    if "transfer_seconds" not in found:
        return ["", ""]
    return [f"{found['transfer_seconds']:.3f} s", f"{found['hidden_transfer_share']:.0%}"]


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
