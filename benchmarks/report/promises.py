"""The section on what the designs promise, from benchmarks/promises.json.

An entry is one figure that a design promises:

    design     A to E: the five designs on which this software is based
    promise    what is promised, in a few words
    promised   {"value": 38, "unit": "GB"}; a range is [14, 16]
    ours       {"value", "unit", "from"}, a source as in figures.py; absent if never measured
    machine    where `ours` was measured; `arithmetic` if it was computed
    what       what `ours` measures, if that differs from the promise
    not_run    why the promise itself was never measured; `ours` is then the closest figure
    why        why our figure differs from the promise

`value` of `ours` is what the table prints. A test compares it, and `machine`, with the source.
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.record import RESULTS

FILE = RESULTS.parent / "promises.json"
TEXT = """
## Promises

Five public designs asked for this software: A, sparse long-context fine-tuning of 120b on four RTX
3090; B and C, LoRA on 20b; D, attention kernels; E, everyday use on a 24 GB card. Every figure they
give, compared with ours; † is gpt-oss-20b's shape with random weights:

"""
HEAD = "| design | promise | promised | ours | measured on | remarks |\n" + "|---" * 6 + "|\n"
Entry = dict[str, Any]


def read_promises() -> list[Entry]:
    """Return the entries of promises.json, in the table's order."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def write_section() -> str:
    """Return the section's text, with a row for each entry."""
    return TEXT + HEAD + "".join(_write_row(entry) for entry in read_promises())


def _write_row(entry: Entry) -> str:
    promised = [entry["design"], entry["promise"], show_amount(entry["promised"])]
    ours = show_amount(entry["ours"]) if "ours" in entry else None
    remarks = [entry[key] for key in ("what", "why") if key in entry]
    if "not_run" in entry:
        how = "by" if entry.get("machine") == "arithmetic" else "on"
        nearest = [f"nearest: {ours} {how} {entry['machine']}"] if ours else []
        cells = [*promised, "not run", "–", "; ".join([entry["not_run"], *nearest, *remarks])]
    else:
        cells = [*promised, str(ours), entry["machine"], "; ".join(remarks)]
    return "| " + " | ".join(cells) + " |\n"


def show_amount(amount: dict[str, Any]) -> str:
    """Return a value with its unit as the table prints it; a range has an en dash."""
    value, unit = amount["value"], amount["unit"]
    shown = "–".join(map(_show_number, value)) if isinstance(value, list) else _show_number(value)
    return shown + ("" if not unit or unit == "×" else " ") + unit


def _show_number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:,}"
