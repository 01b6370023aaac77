"""Layouts of rows, recognised by a key, each turned into what stages read.

| key             | layout                                                                   |
|-----------------|--------------------------------------------------------------------------|
| `messages`      | chat and harmony (messages.py), with `tools`                             |
| `conversations` | ShareGPT: `from` and `value` a message; or messages under another name   |
| `instruction`   | Alpaca: the question, with an `input` below it; `output` is the answer,  |
|                 | its reasoning under `thinking` or another of a message's names for it    |
| `text`          | plain text without turns: every token is trained                         |
| `input_ids`     | tokens, trained where `labels` repeat them; without `labels`, everywhere |

The first three become `messages`; a `system` text of ShareGPT and Alpaca is the first of them. A
row with the keys of two layouts, or of none, is refused, and so is one with a system text beside
its messages that is not the first of them. The rows of a file may differ in layout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from sparselong.data.calls import check_tools, find_texts
from sparselong.data.lines import EMPTY, Fault, check_text, show_keys, shown
from sparselong.data.messages import (
    MASKS,
    REASONING,
    VARIABLES,
    check_messages,
    check_unsupported,
    find_ignored,
)
from sparselong.files import parse_json

IGNORED = -100
"""Label of a token that is not trained."""
WEIGHTS = ("weight", "train")
_UNSUPPORTED = (
    *("functions", "builtin_tools", "tool_calls", "function_call", "position_ids", "history"),
    *("image", "images", "video", "videos", "audio", "audios", *MASKS),
)
_SYSTEM = ("system", "system_prompt", "system_message")
_OF_CHATS = ("tools", "chat_template_kwargs", *VARIABLES)
_OF_PAIRS = {"chosen", "rejected"}
_SPEAKERS = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"},
    **{"chatgpt": "assistant", "model": "assistant", "system": "system", "developer": "developer"},
    **{"tool": "tool", "observation": "tool", "function_call": "call"},
}
"""Role by what ShareGPT has under `from`; a call is an assistant's, with JSON under `value`."""


def read_layout(row: dict[str, Any], ignored: Counter[str], columnar: bool) -> dict[str, Any]:
    """Return a row's `messages` and `tools`, its `text`, or its `input_ids` and `labels`.

    Args:
        row: a row whose layout is not known.
        ignored: names of keys without meaning for training are added.
        columnar: whether the row comes from a table, in which absent keys are null.

    Raises:
        Fault: the layout is unknown, or the row is malformed.
    """
    given = [key for key in _LAYOUTS if row.get(key) not in EMPTY]
    given = given or [key for key in _LAYOUTS if row.get(key) is not None]
    expected = f"one of the keys {', '.join(_LAYOUTS)}"
    if not given:
        if row.keys() >= _OF_PAIRS:
            raise Fault(
                f"a preference pair: {show_keys(sorted(row))}",
                "write each prompt with its chosen answer as `messages`, or remove the row",
                "a conversation to imitate; preference pairs are not supported",
            )
        found = f"no list under `messages`; the row's keys are {show_keys(sorted(row))}"
        raise Fault(found, "rename or convert the columns", expected)
    if len(given) > 1:
        found = f"the row has {' and '.join(f'`{key}`' for key in given)}, which are two layouts"
        raise Fault(found, "remove one of them", expected)
    check_unsupported(row, _UNSUPPORTED, "the row")
    read, own = _LAYOUTS[given[0]]
    known = {*own, *_OF_CHATS, *WEIGHTS, *_UNSUPPORTED, given[0]}
    ignored.update(find_ignored(row, known, "the row"))
    found = read(row)
    if "messages" not in found:
        for key in _OF_CHATS:
            if row.get(key) not in EMPTY:
                raise Fault(f"a row of `{given[0]}` has `{key}`: {shown(row[key])}", "remove it")
        return found
    for key in _SYSTEM:
        if key not in own:
            _refuse_other_system(row, key, found["messages"])
    found["messages"] = check_messages(found["messages"], ignored, columnar)
    if row.get("tools") not in EMPTY:
        found["tools"] = check_tools(row["tools"], ignored, columnar)
        for text in find_texts(found["tools"]):
            check_text(text, "`tools`")
    return found


def _read_messages(row: dict[str, Any]) -> dict[str, Any]:
    return {"messages": row["messages"]}


def _refuse_other_system(row: dict[str, Any], key: str, messages: Any) -> None:
    """Raise if a row has a system text that is not in its first message."""
    text = row.get(key)
    first = messages[0] if isinstance(messages, list) and messages else None
    said = first.get("content") if isinstance(first, dict) else None
    if text not in EMPTY and not (isinstance(said, str) and str(text) in said):
        raise Fault(
            f"the row has `{key}` beside its messages: {shown(text)}",
            "make it the first message, or remove it",
            "the system text as the first message",
        )


def _read_sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise Fault(f"`conversations` is {type(turns).__name__}, not a list")
    return {"messages": [*_system(row), *map(_read_turn, turns, range(1, len(turns) + 1))]}


def _read_turn(turn: Any, i: int) -> Any:
    """Return a turn of ShareGPT as a message, with its other keys."""
    if not isinstance(turn, dict) or not {"from", "value"} & {k for k, v in turn.items() if v}:
        return turn
    if any(turn.get(key) not in EMPTY for key in ("role", "content")):
        raise Fault(f"turn {i} has `from` or `value` beside `role` or `content`")
    speaker, value = turn.get("from"), turn.get("value")
    role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise Fault(
            f"turn {i} is from {shown(speaker)}", "rename or remove it", f"{', '.join(_SPEAKERS)}"
        )
    others = {k: v for k, v in turn.items() if k not in ("from", "value", "role", "content")}
    if role == "call":
        call = {"function": _read_call(value, i)}
        return {**others, "role": "assistant", "content": "", "tool_calls": [call]}
    return {**others, "role": role, "content": value}


def _read_call(value: Any, i: int) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        raise Fault(f"the call of turn {i}: {error}", expected='{"name", "arguments"}') from error


def _read_alpaca(row: dict[str, Any]) -> dict[str, Any]:
    texts = {}
    for key in ("instruction", "input", "output"):
        value = row.get(key)
        if not isinstance(value, str) and not (key == "input" and value is None):
            raise Fault(f"`{key}` is {type(value).__name__}, not text", expected="a text")
        texts[key] = value
    question = "\n\n".join(filter(None, (texts["instruction"], texts["input"])))
    user = {"role": "user", "content": question}
    reasoning = {key: row[key] for key in REASONING if key in row}
    answer = {"role": "assistant", "content": texts["output"], **reasoning}
    return {"messages": [*_system(row), user, answer]}


def _system(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [] if row.get("system") in EMPTY else [{"role": "system", "content": row["system"]}]


def _read_text(row: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(row["text"], str) or not row["text"].strip():
        raise Fault(f"`text` is {shown(row['text'])}", expected="a text, not blank")
    return {"text": check_text(row["text"], "`text`")}


def _read_tokens(row: dict[str, Any]) -> dict[str, Any]:
    ids = _integers(row, "input_ids")
    if not ids or min(ids) < 0:
        raise Fault(f"`input_ids` is {shown(ids)}", expected="token ids from 0")
    for key in ("labels", "attention_mask"):
        if row.get(key) is not None and len(_integers(row, key)) != len(ids):
            raise Fault(f"`input_ids` has {len(ids)} entries, but `{key}` {len(row[key])}")
    if any(each != 1 for each in row.get("attention_mask") or ()):
        raise Fault("`attention_mask` is not 1 everywhere", "remove the padding", "no padding")
    if row.get("labels") is None:
        return {"input_ids": ids}
    for i, (token, wanted) in enumerate(zip(ids, row["labels"], strict=True), 1):
        if wanted not in (token, IGNORED):
            raise Fault(
                f"label {i} is {wanted}, token {i} is {token}",
                "do not shift the labels",
                f"labels that repeat their tokens, or are {IGNORED}",
            )
    if all(wanted == IGNORED for wanted in row["labels"]):
        raise Fault(f"all labels are {IGNORED}", "remove the row", "rows to train on")
    return {"input_ids": ids, "labels": row["labels"]}


def _integers(row: dict[str, Any], key: str) -> list[int]:
    value = row[key]
    if not isinstance(value, list) or not all(type(each) is int for each in value):
        raise Fault(f"`{key}` is {shown(value)}", expected="a list of integers")
    return value


_LAYOUTS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], tuple[str, ...]]] = {
    "messages": (_read_messages, ()),
    "conversations": (_read_sharegpt, ("system",)),
    "instruction": (_read_alpaca, ("input", "output", "system", *REASONING)),
    "text": (_read_text, ()),
    "input_ids": (_read_tokens, ("labels", "attention_mask")),
}
"""How a layout is read, and which keys it has beside the one that shows it."""
