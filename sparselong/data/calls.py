"""Tools, calls and results of a row, in the one form that gpt-oss's template reads.

A message makes at most one call, because the template writes no more; the message after it is the
call's result, because the template names the last call. Left out: the built-in browser and python.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from sparselong.data.lines import EMPTY, Fault, show_keys, shown
from sparselong.files import parse_json

_FUNCTION = ("name", "description", "parameters")
_ARROW = "write it as JSON text: tables fill absent keys with null, as if that were their value"


def check_call(calls: Any, i: int, columnar: bool) -> dict[str, Any]:
    """Return a message's one tool call with its arguments as an object.

    Args:
        calls: what message i has under `tool_calls`.
        i: number of the message.
        columnar: whether the row comes from a table, in which absent keys are null.

    Raises:
        Fault: it is not one call of a function.
    """
    if isinstance(calls, list) and len(calls) > 1:
        raise Fault(
            f"message {i} has {len(calls)} tool calls",
            "put each call into a message of its own, followed by its result",
            "one tool call a message, since the chat template writes no more",
        )
    call = calls[0] if isinstance(calls, list) else None
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not is_text(name):
        raise Fault(f"message {i} has the tool call {shown(call)}", expected="a named function")
    others = _others(call, ("id", "index", "type", "function", "name", "arguments"))
    others += _others(function, ("name", "arguments")) if function is not call else []
    if others or call.get("type", "function") not in ("function", *EMPTY[:2]):
        what = show_keys(others) if others else f"the type {shown(call['type'])}"
        raise Fault(f"the tool call of message {i} has {what}")
    arguments = _read_json(function.get("arguments"), f"the arguments of message {i}")
    arguments = {} if arguments in EMPTY else arguments
    if not isinstance(arguments, dict):
        raise Fault(f"the arguments of message {i} are {type(arguments).__name__}, not an object")
    if columnar and function.get("arguments") is arguments and _has_null(arguments):
        raise Fault(f"the arguments of message {i} hold null: {shown(arguments)}", _ARROW)
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def check_result(message: dict[str, Any], before: dict[str, Any] | None, i: int) -> None:
    """Raise unless tool message i is the result of the call in the message before it.

    Args:
        message: the tool message.
        before: the message before it as the row has it.
        i: number of the tool message.
    """
    calls = before.get("tool_calls") if before else None
    if calls in EMPTY or not isinstance(calls, list) or not isinstance(calls[0], dict):
        raise Fault(
            f"message {i} is a tool message, but message {i - 1} has no tool call",
            "put each result after the message with its call",
            "a tool call directly before its result",
        )
    function = calls[0].get("function", calls[0])
    for key, value in (("tool_call_id", calls[0].get("id")), ("name", function.get("name"))):
        if message.get(key) not in EMPTY and value not in EMPTY and message[key] != value:
            raise Fault(
                f"message {i} has the {key} {shown(message[key])}",
                "put each result after the message with its call",
                f"that of the call before it, {shown(value)}",
            )


def check_tools(tools: Any, ignored: Counter[str], columnar: bool) -> list[dict[str, Any]]:
    """Return a row's function definitions.

    Args:
        tools: what the row has under `tools`: a list, or JSON text of one.
        ignored: keys of definitions that the template does not read are added.
        columnar: whether the row comes from a table, in which absent keys are null.

    Raises:
        Fault: it is not a list of functions.
    """
    read = _read_json(tools, "`tools`")
    if not isinstance(read, list):
        raise Fault(f"`tools` is {type(read).__name__}", expected="a list of functions")
    if columnar and read is tools and _has_null(read):
        raise Fault(f"`tools` holds null: {shown(read)}", _ARROW)
    checked, others = [], set()
    for i, tool in enumerate(read, 1):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not is_text(function.get("name")):
            raise Fault(f"tool {i} is {shown(tool)}", expected="a function with a name")
        if tool.get("type", "function") not in ("function", *EMPTY[:2]):
            raise Fault(f"tool {i} has the type {shown(tool['type'])}", expected="functions")
        if not isinstance(function.get("parameters") or {}, dict):
            raise Fault(f"the parameters of tool {i} are not an object", expected="JSON schema")
        if not isinstance(function.get("description") or "", str):
            raise Fault(f"the description of tool {i} is not text")
        others |= {f"tools.{key}" for key in _others(tool, ("type", "function", *_FUNCTION))}
        others |= {f"tools.{key}" for key in _others(function, ("type", *_FUNCTION))}
        # The template adds the description to other text, so it must be there.
        kept = {"name": function["name"], "description": function.get("description") or ""}
        if function.get("parameters") not in EMPTY:
            kept["parameters"] = function["parameters"]
        checked.append({"type": "function", "function": kept})
    ignored.update(others)
    return checked


def find_texts(value: Any) -> Iterator[str]:
    """Yield every text within lists and dictionaries, their keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for pair in value.items():
            yield from find_texts(list(pair))
    elif isinstance(value, list):
        for each in value:
            yield from find_texts(each)


def is_text(value: Any) -> bool:
    """Return whether a value is a text that is not empty."""
    return isinstance(value, str) and value != ""


def _others(holder: dict[str, Any], known: tuple[str, ...]) -> list[str]:
    return sorted(key for key, value in holder.items() if key not in known and value not in EMPTY)


def _read_json(value: Any, name: str) -> Any:
    if not is_text(value):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        raise Fault(f"{name}: {error}: {shown(value)}", expected="JSON") from error


def _has_null(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_null, value.values()))
    return any(map(_has_null, value)) if isinstance(value, list) else value is None
