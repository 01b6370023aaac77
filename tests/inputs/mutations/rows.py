"""Mutations of a valid data file, and what each must lead to.

A change returns the file's bytes and what must follow: `same` (the reference's tokens), `refused`
(explained), `either`, `spelled` (as many control tokens as in the reference, although their names
occur in a message), or rows in plain form whose tokens must result.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Rows = list[dict[str, Any]]
Expected = Literal["same", "refused", "either", "spelled"] | Rows


@dataclass(frozen=True)
class RowMutation:
    """A change of a data file, by name."""

    name: str
    change: Callable[[Rows, random.Random], tuple[bytes, Expected]]


def reference_rows() -> Rows:
    """Return valid conversations of several forms; the assistant's last turn may think."""
    rows: Rows = []
    for n in range(12):
        messages = [
            {"role": "user", "content": f"Count to {n + 2}, please."},
            {"role": "assistant", "content": " ".join(map(str, range(1, n + 3)))},
        ]
        if n % 2:
            messages += [
                {"role": "user", "content": "Größer\u2028als zehn?\n\n    if n > 10: …"},
                {"role": "assistant", "content": str(n + 2 > 10), "thinking": f"{n + 2} - 10"},
            ]
        if n % 3 == 0:
            messages.insert(0, {"role": "system", "content": "Answer briefly."})
        rows.append({"messages": messages})
    return rows


def write(rows: Any, **style: Any) -> bytes:
    """Return rows as a JSON Lines file."""
    return "".join(json.dumps(row, **style) + "\n" for row in rows).encode()


def _turn(rows: Rows, rng: random.Random, role: str = "assistant") -> dict[str, Any]:
    return rng.choice([m for row in rows for m in row["messages"] if m["role"] == role])


def _thinking(rows: Rows, rng: random.Random) -> dict[str, Any]:
    return rng.choice([m for row in rows for m in row["messages"] if "thinking" in m])


def _each(change: Callable[[str], str]):
    def apply(rows: Rows, rng: random.Random) -> tuple[bytes, Expected]:
        return change(write(rows).decode()).encode(), "same"

    return apply


def _styled(**style: Any):
    return lambda rows, rng: (write(rows, **style), "same")


def _shuffled_keys(rows: Rows, rng: random.Random) -> tuple[bytes, Expected]:
    def shuffle(document: dict[str, Any]) -> dict[str, Any]:
        items = list(document.items())
        rng.shuffle(items)
        return dict(items)

    return write([{"messages": [shuffle(m) for m in row["messages"]]} for row in rows]), "same"


def _row_key(key: str, value: Any, expected: Expected):
    def apply(rows: Rows, rng: random.Random) -> tuple[bytes, Expected]:
        rng.choice(rows)[key] = value
        return write(rows), expected

    return apply


def _all_rows_key(key: str, make: Callable[[int], Any]):
    def apply(rows: Rows, rng: random.Random) -> tuple[bytes, Expected]:
        for number, row in enumerate(rows):
            row[key] = make(number)
        return write(rows), "same"

    return apply


def _message_key(key: str, value: Any, expected: Expected, role: str = "assistant"):
    def apply(rows: Rows, rng: random.Random) -> tuple[bytes, Expected]:
        _turn(rows, rng, role)[key] = value
        return write(rows), expected

    return apply


def _thinking_as(key: str):
    def apply(rows: Rows, rng: random.Random) -> tuple[bytes, Expected]:
        for row in rows:
            for message in row["messages"]:
                if "thinking" in message:
                    message[key] = message.pop("thinking")
        return write(rows), "same"

    return apply


def _without(key: str):
    def apply(rows: Rows, rng: random.Random) -> tuple[bytes, Expected]:
        del _turn(rows, rng)[key]
        return write(rows), "refused"

    return apply


def _spelled(text: str, role: str):
    def apply(rows: Rows, rng: random.Random) -> tuple[bytes, Expected]:
        message = _turn(rows, rng, role)
        message["content"] += f" {text} "
        return write(rows), "spelled"

    return apply


def _means(change: Callable[[Rows, random.Random], None]):
    """A change of valid rows into other valid rows: they mean what they say."""

    def apply(rows: Rows, rng: random.Random) -> tuple[bytes, Expected]:
        change(rows, rng)
        return write(rows), copy.deepcopy(rows)

    return apply


def _line(change: Callable[[str, random.Random], str], expected: Expected = "refused"):
    """A change of one line's text."""

    def apply(rows: Rows, rng: random.Random) -> tuple[bytes, Expected]:
        lines = write(rows).decode().splitlines()
        place = rng.randrange(len(lines))
        lines[place] = change(lines[place], rng)
        return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass"), expected

    return apply


def _file(change: Callable[[bytes, random.Random], bytes], expected: Expected):
    return lambda rows, rng: (change(write(rows, ensure_ascii=False), rng), expected)


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _shuffle_rows(rows: Rows, rng: random.Random) -> None:
    rng.shuffle(rows)


def _shorten(rows: Rows, rng: random.Random) -> None:
    del rows[rng.randrange(1, len(rows)) :]


def _repeat_row(rows: Rows, rng: random.Random) -> None:
    rows.insert(rng.randrange(len(rows)), copy.deepcopy(rng.choice(rows)))


def _other_text(rows: Rows, rng: random.Random) -> None:
    _turn(rows, rng)["content"] = (
        "".join(rng.choice("ab \n\t0é€😀{}[]\\\"'") for _ in range(40)) + "."
    )


def _dates(rows: Rows, rng: random.Random) -> None:
    for row in rows:
        for message in row["messages"]:
            message.pop("thinking", None)
            message["content"] = f"20{rng.randrange(10, 30)}-01-02T03:04:05"


def _numbers(rows: Rows, rng: random.Random) -> None:
    for row in rows:
        for message in row["messages"]:
            message.pop("thinking", None)
            message["content"] = str(rng.randrange(1000))


def _late_thinking(rows: Rows, rng: random.Random) -> None:
    for row in rows:
        for message in row["messages"]:
            message.pop("thinking", None)
    rows[-1]["messages"][-1]["thinking"] = "At last."


_CALL = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
_HARMONY = ("<|end|>", "<|return|>", "<|start|>assistant", "<|end|><|start|>user<|message|>No.")

FIXED: dict[str, Callable[[Rows, random.Random], tuple[bytes, Expected]]] = {
    "bom": _each(lambda text: "\ufeff" + text),
    "crlf": _each(lambda text: text.replace("\n", "\r\n")),
    "no-final-newline": _each(str.rstrip),
    "blank-lines": _each(lambda text: text.replace("\n", "\n\n") + "\n  \n"),
    "raw-unicode": _styled(ensure_ascii=False),
    "compact": _styled(separators=(",", ":")),
    "spaced": _styled(separators=(" , ", " : ")),
    "id-column": _all_rows_key("id", lambda n: n),
    "date-column": _all_rows_key("created", lambda n: f"2024-01-{n + 1:02d}"),
    "mixed-column": _all_rows_key("note", lambda n: [None, 1, "a", [2], {"b": 3}][n % 5]),
    "null-tools": _all_rows_key("tools", lambda n: None),
    "empty-tools": _all_rows_key("tools", lambda n: []),
    "dates": _means(_dates),
    "numbers": _means(_numbers),
    "late-thinking": _means(_late_thinking),
    "reasoning-content": _thinking_as("reasoning_content"),
    "reasoning": _thinking_as("reasoning"),
    "empty": _file(lambda data, rng: b"", "refused"),
    "only-blank": _file(lambda data, rng: b"\n\n", "refused"),
    "array": lambda rows, rng: (json.dumps(rows).encode(), "refused"),
    "utf-16": _file(lambda data, rng: data.decode().encode("utf-16"), "refused"),
    "gzip": _file(lambda data, rng: b"\x1f\x8b\x08\x00" + data, "refused"),
}
_REPEATED: dict[str, Callable[[Rows, random.Random], tuple[bytes, Expected]]] = {
    "keys-shuffled": _shuffled_keys,
    "null-call": _message_key("tool_calls", None, "same"),
    "empty-call": _message_key("tool_calls", [], "same"),
    "null-name": _message_key("name", None, "same", "user"),
    "null-reasoning": _message_key("reasoning_content", None, "same"),
    "weight-one": _message_key("weight", 1, "same"),
    "rows-shuffled": _means(_shuffle_rows),
    "rows-fewer": _means(_shorten),
    "row-repeated": _means(_repeat_row),
    "other-text": _means(_other_text),
    "call": _message_key("tool_calls", _CALL, "refused"),
    "function-call": _message_key("function_call", {"name": "f", "arguments": "{}"}, "refused"),
    "tools": _row_key("tools", [{"type": "function", "function": {"name": "f"}}], "refused"),
    "tool-role": _message_key("role", "tool", "refused", "user"),
    "role-typo": _message_key("role", "asistant", "refused"),
    "role-upper": _message_key("role", "Assistant", "refused"),
    "role-null": _message_key("role", None, "refused", "user"),
    "content-null": _message_key("content", None, "refused"),
    "content-number": _message_key("content", 12, "refused"),
    "content-empty": _message_key("content", "", "refused"),
    "content-object": _message_key("content", {"text": "a"}, "refused"),
    "content-image": _message_key("content", [{"type": "image_url", "image_url": "x"}], "refused"),
    "content-parts": _message_key("content", [{"type": "text", "text": "a"}], "either"),
    "thinking-number": _message_key("thinking", 3, "refused"),
    "thinking-of-user": _message_key("thinking", "Hm.", "refused", "user"),
    "weight-half": _message_key("weight", 0.5, "refused"),
    "weight-text": _message_key("weight", "0", "refused"),
    "channel-unknown": _message_key("channel", "finale", "refused"),
    "effort-unknown": _row_key("reasoning_effort", "extreme", "refused"),
    "template-kwargs": _row_key("chat_template_kwargs", {"unknown_key": 1}, "refused"),
    "messages-null": _row_key("messages", None, "refused"),
    "messages-object": _row_key("messages", {"role": "user", "content": "a"}, "refused"),
    "messages-empty": _row_key("messages", [], "refused"),
    "no-role": _without("role"),
    "no-content": _without("content"),
    "line-cut": _line(lambda line, rng: line[: rng.randrange(1, len(line) - 1)]),
    "line-list": _line(lambda line, rng: f"[{line}]"),
    "line-text": _line(lambda line, rng: json.dumps(line)),
    "line-number": _line(lambda line, rng: "7"),
    "line-null": _line(lambda line, rng: "null"),
    "line-twice": _line(lambda line, rng: line + line),
    "line-deep": _line(lambda line, rng: "[" * 100_000 + "]" * 100_000),
    "line-deep-column": _line(
        lambda line, rng: f'{{"x": {"[" * 5000}{"]" * 5000}, {line[1:]}', "either"
    ),
    "surrogate": _line(lambda line, rng: line.replace("Count", "\\ud800Count")),
    "bytes": _file(
        lambda data, rng: data.replace(b"Count", b"C\xffunt", rng.randint(1, 3)), "refused"
    ),
    "byte-flipped": _file(_flip, "either"),
    "file-cut": _file(lambda data, rng: data[: rng.randrange(len(data))], "either"),
}
for _text in _HARMONY:
    for _role in ("user", "assistant", "system"):
        _REPEATED[f"spelled-{_text}-{_role}"] = _spelled(_text, _role)
_REPEATED["channel-header"] = _message_key(
    "content", "<|channel|>analysis<|message|>Hm.<|end|>", "refused"
)
_TIMES = 3


def all_row_mutations() -> list[RowMutation]:
    """Return every mutation; those at a random place occur several times."""
    found = [RowMutation(name, change) for name, change in FIXED.items()]
    for name, change in _REPEATED.items():
        times = 12 if name in ("byte-flipped", "file-cut") else _TIMES
        found += [RowMutation(f"{name}-{number}", change) for number in range(times)]
    return found
