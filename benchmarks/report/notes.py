"""Notes below a table: what was not measured and why, and whose errors exceed the limit."""

from __future__ import annotations

from typing import Any


def list_notes(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line for each backend that was not measured, or whose error exceeds the limit."""
    lines = []
    for entry in rows:
        if entry["metric"] == "not_measured":
            lines.append(f"\n`{entry['backend']}` was not measured: {entry['case']['reason']}.")
        elif entry["metric"] == "error_exceeds_limit":
            lines.append(
                f"\n`{entry['backend']}`: an error is above twice that of plain torch in bf16."
            )
    return lines
