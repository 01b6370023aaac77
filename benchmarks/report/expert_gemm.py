"""The section on the expert pass, from benchmarks/results/expert_gemm-*.json."""

from __future__ import annotations

from typing import Any

from benchmarks.record import newest
from benchmarks.report.notes import list_notes

EXPERTS = """
## Experts over packed MXFP4

One layer of gpt-oss-20b's experts (32 experts of 2,880 / 2,880, top-4), bf16, the whole pass with
sorting, biases, gate and weighted sum; medians in ms. `transformers` is its grouped_mm over bf16
weights, which take four times the memory; `torch_grouped_mm` and `dense_matmul` are the products
alone. Balanced routing gives every expert the same number of rows. A backend is listed only if its
error is at most twice that of plain torch in bf16. `chosen` is the backend that `expert_mlp(...)`
selected by default at the time. Its threshold has since been changed according to these figures:
512 rows per expert now run `packed`.
"""
LORA = """
Arms `lora_*` have rank-8 adapters on both projections and gradients of these: `lora_chosen` is this
project's, `lora_axolotl` axolotl 0.19's MXFP4 + LoRA kernels, tuned among the configurations that
it lists for this GPU and three more, `lora_nf4_gemm` grouped-nf4-gemm 0.51's fused mode over the
same bytes.
"""
PASSES = {"forward": "forward", "forward_backward": "forward + backward"}


def write_section() -> str:
    """Return the section's text for all machines; empty if there are no results."""
    found = newest("expert_gemm").items()
    tables = "".join(write_experts(machine, document) for machine, document in found)
    text = EXPERTS + (LORA if "lora_" in tables else "")
    return text + tables if tables else ""


def write_experts(machine: str, document: dict[str, Any]) -> str:
    """Return the tables for one machine, one per pass."""
    values = {
        (tuple(entry["case"].values()), entry["backend"], entry["metric"]): entry["value"]
        for entry in document["rows"]
    }
    versions = document["versions"]
    lines = [
        f"\n### {machine} (torch {versions['torch']}, triton {versions['triton']}, "
        f"{document['date']}, `{document['file']}`)"
    ]
    for key, name in PASSES.items():
        timed = {(case, backend) for case, backend, metric in values if metric == f"{key}_ms"}
        backends = list(dict.fromkeys(b for c, b, _ in values if (c, b) in timed))
        cases = list(dict.fromkeys(c for c, b, _ in values if (c, b) in timed))
        lines += [
            f"\n{name.capitalize()}, ms (TFLOP/s; peak MiB without the inputs):\n",
            "| rows per expert | tokens | routing | " + " | ".join(backends) + " |",
            "|---" * (3 + len(backends)) + "|",
        ]
        for case in cases:
            cells = [f"{case[0]:g}", f"{case[1]:,}", case[2]]
            cells += [show(values, case, backend, key) for backend in backends]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *list_notes(document["rows"]), ""])


def show(values: dict, case: tuple, backend: str, key: str) -> str:
    """Return a cell: ms and, in parentheses, the rate and the peak if it was measured."""
    ms = values.get((case, backend, f"{key}_ms"))
    if ms is None:
        return "–"
    peak = values.get((case, backend, f"{key}_peak_bytes"))
    peak_mib = "" if peak is None else f"; {peak / 2**20:,.0f}"
    return f"{ms:.3f} ({values[case, backend, f'{key}_rate']:.0f}{peak_mib})"
