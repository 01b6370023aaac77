"""Rows as conversations: every key is used, refused by name, or counted as ignored.

A conversation is what a line of a prepared file holds: `messages` (messages.py says what is in
them), or `text` or `input_ids` for rows without turns (layouts.py), `origin` (file and line, or
dataset and row, for later messages) and, where given, the template's variables `tools`,
`reasoning_effort` and `model_identity`. Checking a conversation again returns it unchanged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparselong.data.calls import find_texts
from sparselong.data.layouts import WEIGHTS, read_layout
from sparselong.data.lines import (
    EMPTY,
    TABLES,
    Fault,
    check_text,
    empty,
    read_file,
    read_lines,
    shown,
)
from sparselong.data.messages import VARIABLES, check_weight
from sparselong.errors import StageError

Conversation = dict[str, Any]
EFFORTS = ("low", "medium", "high")


@dataclass
class Remarks:
    """What was passed over while a source was read."""

    blank_lines: int = 0
    ignored: Counter[str] = field(default_factory=Counter)
    """Count of rows by the name of a key without meaning for training."""
    without_turns: int = 0
    """Count of rows of `text` and `input_ids`."""

    def sentences(self, source: str) -> list[str]:
        """Return what to report about the source, one sentence each."""
        said = []
        if self.blank_lines:
            said.append(f"{source}: blank lines skipped: {self.blank_lines:,}")
        if self.ignored:
            names = ", ".join(
                f"{shown(key)[1:-1]} ({count:,} rows)" for key, count in self.ignored.most_common()
            )
            said.append(f"{source}: keys without meaning for training are ignored: {names}")
        if self.without_turns:
            said.append(
                f"{source}: rows of `text` or `input_ids`, trained whole or as their labels say: "
                f"{self.without_turns:,}"
            )
        return said


def locate(conversation: Conversation) -> str:
    """Return where a conversation comes from: `FILE, line N` or `dataset NAME, row N`."""
    origin: Any = conversation.get("origin")
    if not _is_origin(origin):
        return "a conversation"
    unit = "line" if "line" in origin else "row"
    return f"{origin['source']}, {unit} {origin[unit]}"


def list_texts(conversation: Conversation) -> list[str]:
    """Return the texts of a row: contents, reasoning and calls' arguments; none of token ids."""
    if "messages" not in conversation:
        return [conversation["text"]] if "text" in conversation else []
    texts = []
    for message in conversation["messages"]:
        texts += [message["content"], message.get("thinking", "")]
        for call in message.get("tool_calls", ()):
            texts += find_texts(call["function"]["arguments"])
    return [text for text in texts if text]


def read_rows(
    path: Path, remarks: Remarks, source: str | None = None, *, prepared: bool = False
) -> Iterator[Conversation]:
    """Yield the conversations of a file.

    Args:
        path: the file.
        remarks: what was passed over is added.
        source: name of the file for messages; the path if None.
        prepared: whether a row's `origin` says where it comes from; else it means nothing.

    Raises:
        StageError: the file cannot be read or has no rows, or a row is refused.
    """
    name, count = source or str(path), 0
    columnar = path.suffix.lower() in TABLES
    unit = "row" if columnar else "line"
    for number, row in read_file(path):
        if row is None:
            remarks.blank_lines += 1
            continue
        count += 1
        origin = {"source": name, unit: number}
        if prepared and isinstance(row, dict):
            own = row.pop("origin", None)
            origin = own if _is_origin(own) else origin
        yield check_row(row, origin, remarks, columnar=columnar)
    if not count:
        found = f"blank lines: {remarks.blank_lines:,}" if remarks.blank_lines else "no lines"
        raise empty(name, found)


def check_row(
    row: Any, origin: dict[str, Any], remarks: Remarks, *, columnar: bool = False
) -> Conversation:
    """Return the conversation that a row means.

    Args:
        row: a parsed line of a file, or a row of a dataset.
        origin: `source` with `line` or `row`.
        remarks: the keys that were ignored are added.
        columnar: whether the row comes from a table, in which absent keys are null.

    Raises:
        StageError: the row is malformed, or something in it is not understood.
    """
    try:
        found = _check(row, remarks.ignored, columnar)
    except Fault as fault:
        where = locate({"origin": origin})
        raise StageError(
            f"{where} is not a conversation that can be used",
            fault.expected,
            fault.found,
            fault.fix,
        ) from fault
    remarks.without_turns += "messages" not in found
    return {**found, "origin": origin}


def is_prepared(path: Path) -> bool:
    """Return whether a file begins with a conversation that says where it comes from."""
    try:
        _, row = next(read_lines(path), (1, None))
    except StageError:
        return False
    return isinstance(row, dict) and _is_origin(row.get("origin"))


def _is_origin(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) not in ({"source", "line"}, {"source", "row"}):
        return False
    number = value.get("line", value.get("row"))
    return isinstance(value["source"], str) and isinstance(number, int)


def _check(row: Any, ignored: Counter[str], columnar: bool) -> Conversation:
    if not isinstance(row, dict):
        fix = "turn a JSON array into one object per line"
        raise Fault(f"a JSON {type(row).__name__} instead of an object", fix)
    weight = check_weight(row, WEIGHTS, "the row")
    if weight == 0:
        raise Fault("the row has weight 0", "remove the row", "rows to train on")
    found = read_layout(row, ignored, columnar)
    return {**found, **_variables(row)}


def _variables(row: dict[str, Any]) -> dict[str, str]:
    """Return the template's variables from the row and its `chat_template_kwargs`."""
    nested = row.get("chat_template_kwargs")
    nested = {} if nested in EMPTY else nested
    if not isinstance(nested, dict):
        raise Fault(f"`chat_template_kwargs` is {type(nested).__name__}, not an object")
    for name, value in nested.items():
        if name not in VARIABLES and value not in EMPTY:
            raise Fault(
                f"`chat_template_kwargs` has {shown(name)}: {shown(value)}",
                "remove it, or the row",
                f"only {' and '.join(VARIABLES)}",
            )
    found = {}
    for name in VARIABLES:
        given = [holder[name] for holder in (row, nested) if holder.get(name) not in EMPTY]
        if not given:
            continue
        if any(value != given[0] for value in given):
            raise Fault(f"`{name}` and `chat_template_kwargs` contradict each other")
        if not isinstance(given[0], str):
            raise Fault(f"`{name}` is {type(given[0]).__name__}, not text")
        found[name] = check_text(given[0], f"`{name}`")
    if found.get("reasoning_effort", "low") not in EFFORTS:
        raise Fault(
            f"`reasoning_effort` is {shown(found['reasoning_effort'])}",
            "correct or remove it",
            " or ".join(EFFORTS),
        )
    return found
