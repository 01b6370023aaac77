"""The health report: a table for the terminal, markdown and JSON for the run directory."""

from __future__ import annotations

import sys
import textwrap
from collections import Counter
from dataclasses import asdict
from typing import Any

from sparselong.config import Config
from sparselong.figures import format_bytes, format_seconds
from sparselong.health.machine import Machine
from sparselong.health.rows import Row
from sparselong.memory import WIDTH, Plan, format_table, memory_lines

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def build(config: Config, machine: Machine, plan: Plan, rows: list[Row]) -> dict[str, Any]:
    """Return the report as a JSON document: verdict, rows, plan, GPUs, free memory and disk."""
    return {
        "model": config.model.base,
        "ready": all(row.status != "fail" for row in rows),
        "rows": [asdict(row) for row in rows],
        "plan": plan.to_dict(),
        "gpus": [asdict(gpu) for gpu in machine.gpus],
        "host_available_bytes": machine.host_available_bytes,
        "disk_free_bytes": machine.run_disk.free_bytes,
    }


def plan_text(report: dict[str, Any]) -> str:
    """Return the planned memory, disk space and time as text, at most 100 columns wide."""
    plan = report["plan"]
    have = [f"GPU {gpu['index']}: {format_bytes(gpu['free_bytes'])}" for gpu in report["gpus"]]
    host = f"host: {format_bytes(report['host_available_bytes'])}"
    lines = [
        *memory_lines(plan),
        *textwrap.wrap(f"Free on this machine: {', '.join([*have, host])}", WIDTH),
    ]
    disk = {name: format_bytes(size) for name, size in plan["bytes_on_disk"].items() if size}
    free = format_bytes(report["disk_free_bytes"])
    lines += format_table(f"Disk (all stages; {free} free at the run directory)", disk)
    seconds = {name: format_seconds(value) for name, value in plan["estimated_seconds"].items()}
    lines += format_table(f"Time (estimate for {plan['estimated_for']})", seconds)
    tokens = f"{plan['training_tokens']:,} training tokens ({plan['training_tokens_note']})"
    return "\n".join([*lines, f"  {tokens}"])


def verdict(report: dict[str, Any]) -> str:
    """Return one line saying whether this machine can run this config."""
    counts = Counter(row["status"] for row in report["rows"])
    can = "can run" if report["ready"] else "cannot run"
    tally = ", ".join(f"{counts[status]} {status}" for status in _COLOURS)
    return f"This machine {can} this config ({report['model']}): {tally}"


def rows_text(report: dict[str, Any]) -> str:
    """Return the rows as plain text, each fix below its finding."""
    left = max(len(row["check"]) for row in report["rows"])
    lines = []
    for row in report["rows"]:
        lines += textwrap.wrap(
            row["found"],
            WIDTH,
            initial_indent=f"{row['status']:<4}  {row['check']:<{left}}  ",
            subsequent_indent=" " * (left + 8),
        )
        if row["fix"]:
            lines += textwrap.wrap(
                f"fix: {row['fix']}",
                WIDTH,
                initial_indent=" " * (left + 8),
                subsequent_indent=" " * (left + 13),
            )
    return "\n".join(lines)


def print_table(report: dict[str, Any]) -> None:
    """Print the rows and the plan to stderr, in colour if it is a terminal."""
    if not sys.stderr.isatty():
        print(rows_text(report), plan_text(report), sep="\n\n", file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(stderr=True)
    grid = Table("", "check", "found", "fix", show_lines=False)
    for row in report["rows"]:
        status = Text(row["status"], style=_COLOURS[row["status"]])
        grid.add_row(status, row["check"], Text(row["found"]), Text(row["fix"]))
    console.print(grid)
    console.print(Text(plan_text(report)))


def markdown(report: dict[str, Any]) -> str:
    """Return the text of report.md."""
    rows = [
        f"| {row['status']} | {row['check']} | {row['found']} | {row['fix']} |"
        for row in report["rows"]
    ]
    return "\n".join(
        [
            "# Health",
            "",
            verdict(report),
            "",
            "| | check | found | fix |",
            "|---|---|---|---|",
            *rows,
            "",
            "```",
            plan_text(report),
            "```",
            "",
        ]
    )
