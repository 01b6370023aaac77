"""The section on the chat endpoint, from benchmarks/results/chat-*.json."""

from __future__ import annotations

from typing import Any

from benchmarks.record import newest

HEAD = """
## The chat endpoint

06_chat.py's endpoint over HTTP on the loopback address, in gpt-oss-20b's shape with random weights
in stage 02's formats and a tokenizer of its vocabulary, beside `generate` on the same prompts in
the same process and run. `whole` is a request that is answered with one document, `stream` one that
is answered by server-sent events; the client is another process. Tokens per second are those after
the first token. Shares are of greedy `generate`. `sampled` is with temperature 1 and top-p 0.95.
"""
NAMES = {"generate": "`generate`", "whole": "whole", "stream": "stream"}


def write_section() -> str:
    """Return the section's text for all machines; empty if there are no results."""
    found = {
        machine: document
        for machine, document in newest("chat").items()
        if document["rows"][0]["case"]["widths"] == "20b"
    }
    tables = "".join(write_machine(machine, document) for machine, document in found.items())
    return HEAD + tables if tables else ""


def write_machine(machine: str, document: dict[str, Any]) -> str:
    """Return one machine's table, and the first token of a second turn."""
    values = {(row["backend"], row["metric"]): row["value"] for row in document["rows"]}
    case, versions = document["rows"][0]["case"], document["versions"]
    prefix = next(row["case"]["prefix"] for row in document["rows"] if "prefix" in row["case"])
    base = values["generate", "throughput"]
    lines = [
        f"\n### {machine} (torch {versions['torch']}, {document['date']}, `{document['file']}`)\n",
        f"A prompt of {case['prompt']:,} tokens, {case['tokens']} generated, "
        f"{case['layers']} layers.\n",
        "| asked | tokens/s | share | sampled, tokens/s | share | first token, ms |",
        "|---|---|---|---|---|---|",
    ]
    for backend, name in NAMES.items():
        greedy, sampled = (
            values[backend, metric] for metric in ("throughput", "sampled_throughput")
        )
        first = values[backend, "first_token_seconds"] * 1e3
        cells = [name, f"{greedy:,.0f}", f"{greedy / base:.1%}", f"{sampled:,.0f}"]
        cells += [f"{sampled / base:.1%}", f"{first:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    turn, tail = (values["whole", f"{name}_first_token_seconds"] * 1e3 for name in ("turn", "tail"))
    read = values["whole", "tokens_to_read"]
    lines.append(
        f"\nA second turn after a prefix of {prefix:,} tokens reads {read:,.0f} and answers its "
        f"first token in {turn:.1f} ms; a whole prompt of as many takes {tail:.1f} ms "
        f"({turn / tail:.2f} times)."
    )
    if ("generate", "null_launch_seconds") in values:
        launch = values["generate", "null_launch_seconds"] * 1e6
        lines.append(f"Launching an empty kernel costs this host {launch:.1f} µs.")
    return "\n".join([*lines, ""])
