"""The section on the four scripts at true widths, from benchmarks/results/true_widths-*.json."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.record import newest
from benchmarks.report.figures import group_by_case

TEXT = """
## The four scripts on gpt-oss-120b's true widths

`benchmarks/true_widths.py` writes a checkpoint in the published form with 128 experts, vocabulary
201,088 and random weights, but fewer layers, and runs the four scripts on it, with the sequence,
experts and vocabulary shared by all GPUs. Then one process that holds the whole model repeats stage
04. `device` is the highest peak of any GPU, `host` that of a process. Differences are relative, the
largest of all conversations or answers; `flips` are items whose most likely answer differs.
"""
STAGES = ("stage", "processes", "seconds", "device", "host")
MODELS = ("model", "perplexity", "conversations", "log-likelihoods", "items", "flips")


def write_section() -> str:
    """Return the section's text for all machines; empty if there are no results."""
    found = newest("true_widths")
    if not found:
        return ""
    return TEXT + "".join(_write_machine(machine, found[machine]) for machine in found)


def _write_machine(machine: str, document: dict[str, Any]) -> str:
    cases = group_by_case(document)
    read = [(json.loads(text), figures) for text, figures in cases.items()]
    contrast = next(figures for case, figures in read if case.get("model") == "contrast")
    lines = [
        f"\n### {machine} (torch {document['versions']['torch']}, {document['date']}, "
        f"`{document['file']}`, {read[0][0]['layers']} layers)\n",
        *_table(STAGES, [_show_stage(*one) for one in read if "stage" in one[0]]),
        "",
        *_table(MODELS, [_show_model(*one) for one in read if "perplexity_difference" in one[1]]),
        f"\nBase and compressed model, which are not the same, differ by "
        f"{contrast['log_likelihood_difference_median']:.1e} (median) and {contrast['flips']:.0f} "
        "flips.",
    ]
    return "\n".join([*lines, ""])


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    head = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return head + ["| " + " | ".join(row) + " |" for row in rows]


def _show_stage(case: dict[str, Any], figures: dict[str, float]) -> list[str]:
    on_gpus = [size for name, size in figures.items() if name.startswith("peak_bytes: cuda")]
    host = figures.get("peak_bytes: host")
    return [
        case["stage"],
        f"{case['processes']}",
        f"{figures['seconds']:.0f}",
        f"{max(on_gpus) / 2**30:.2f} GiB" if on_gpus else "",
        "" if host is None else f"{host / 2**30:.2f} GiB",
    ]


def _show_model(case: dict[str, Any], figures: dict[str, float]) -> list[str]:
    names = ("perplexity", "conversation_nll", "log_likelihood")
    return [
        case["model"],
        *(f"{figures[f'{name}_difference']:.0e}" for name in names),
        f"{figures['items']:.0f}",
        f"{figures['flips']:.0f}",
    ]
