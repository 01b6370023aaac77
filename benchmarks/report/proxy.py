"""The section on the proxy of BENCHMARKS.md, from benchmarks/results/proxy-*.json."""

from __future__ import annotations

from typing import Any

from benchmarks.record import newest

TEXT = """
## The model on which compression is judged

`benchmarks/proxy`: a small gpt-oss that one GPU trains from scratch in minutes on texts that every
machine has (`prepare.py`, `train.py`), here as `measure.py` finds it. A proxy is of use if
perplexity rises where attention is damaged, and if it is well above chance (25 %) on items in
hellaswag's format.
"""


def write_section() -> str:
    """Return the section's text for all machines; empty if there are no results."""
    found = newest("proxy").items()
    return TEXT + "".join(_write_machine(*each) for each in found) if found else ""


def _write_machine(machine: str, document: dict[str, Any]) -> str:
    rows = document["rows"]
    lines = [
        f"\n### {machine} (torch {document['versions']['torch']}, {document['date']}, "
        f"`{document['file']}`)\n",
        "| held-out text | perplexity |",
        "|---|---|",
    ]
    for entry in rows:
        case = entry["case"]
        # Kinds of text; their languages, two words, are in the file.
        if entry["metric"] == "perplexity" and "first" not in case and " " not in case["text"]:
            damage = "" if entry["backend"] == "base" else f", {entry['backend']}"
            lines.append(f"| {case['text']}{damage} | {entry['value']:.2f} |")
    found = {entry["metric"]: entry for entry in rows if "items" in entry["case"]}
    accuracy = ", ".join(
        f"{found[name]['value']:.1%} ± {found[f'{name}_stderr']['value']:.1%} ({name})"
        for name in ("acc", "acc_norm")
    )
    lines += [f"\n{found['acc']['case']['items']} items: {accuracy}.\n", *_write_tasks(rows)]
    return "\n".join([*lines, ""])


def _write_tasks(rows: list[dict[str, Any]]) -> list[str]:
    """Return RULER's scores, a line for each task and a column for each length."""
    scores = {
        (entry["case"]["task"], entry["case"]["tokens"]): entry["value"]
        for entry in rows
        if "task" in entry["case"]
    }
    lengths = sorted({length for _, length in scores})
    return [
        "| task | " + " | ".join(f"{length:,} tokens" for length in lengths) + " |",
        "|---" * (1 + len(lengths)) + "|",
        *(
            f"| {task} | " + " | ".join(f"{scores[task, length]:.1%}" for length in lengths) + " |"
            for task in dict.fromkeys(task for task, _ in scores)
        ),
    ]
