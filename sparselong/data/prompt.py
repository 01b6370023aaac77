"""The prompt of an assistant's turn: a chat in the checkpoint's own template, as token ids.

The messages are those of OpenAI's chat API. What the template would leave out without a word is
refused by name: a second tool call in a message, instructions after the first message, keys that
mean nothing to it. What it leaves out on purpose stays its decision: gpt-oss's template drops the
thinking of earlier turns, except before tool calls that no answer follows yet.

Control tokens that a message or tool spells (`<|end|>`) are ordinary text, as in tokens.py.
"""

from __future__ import annotations

import datetime
import json
from typing import Any

from sparselong.config import Config
from sparselong.data.calls import find_texts, is_text
from sparselong.data.harmony import read_marks
from sparselong.data.lines import EMPTY, Fault, check_text, shown
from sparselong.data.messages import join_parts
from sparselong.data.rows import EFFORTS
from sparselong.data.template import Template
from sparselong.data.tokens import encode_prompt
from sparselong.errors import StageError

_REASONING = ("thinking", "reasoning_content", "reasoning")
_KEYS = {
    "system": (),
    "developer": (),
    "user": (),
    "assistant": (*_REASONING, "tool_calls"),
    "tool": ("tool_call_id", "name"),
}
"""Keys beside `role` and `content` by role."""
_BEGINNING = "<|start|>assistant"
_UNREADABLE = "the chat cannot be put to the model"


def render_prompt(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    *,
    today: datetime.date,
    reasoning_effort: str | None = None,
    tools: list[dict[str, Any]] | None = None,
    system: str | None = None,
) -> list[int]:
    """Return the tokens of a chat, ending in `<|start|>assistant`.

    Args:
        tokenizer: a fast transformers tokenizer with harmony's chat template.
        messages: messages with `role` (system or developer first; user, assistant, tool) and
            `content` (text or text parts), of the assistant also with `thinking` and `tool_calls`.
            Tool calls may have their arguments as JSON text or as an object.
        today: the date for templates that write one; a run's is `rendering_date`.
        reasoning_effort: low, medium or high; the template's own default if None.
        tools: function definitions of OpenAI's chat API.
        system: instructions, instead of a system or developer message.

    Raises:
        StageError: the messages or tools are malformed, or something in them would be left out; or
            the template rejects them, or is not harmony's.
    """
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    try:
        checked, variables = _check_messages(messages), _check_variables(reasoning_effort, tools)
        for text in find_texts([checked, variables]):
            check_text(text, "a text of the chat")
        template = Template(variables, tokenizer, today)
        if "tool_calls" not in template.source and any("tool_calls" in each for each in checked):
            raise _unsuitable(template, "a template that writes tool calls", "one that does not")
        ids = encode_prompt(template, checked)
    except Fault as fault:
        raise StageError(_UNREADABLE, fault.expected, fault.found, fault.fix) from fault
    except RecursionError as error:
        fix = "send flatter tools or arguments"
        raise StageError(_UNREADABLE, "JSON of moderate depth", "deeper nesting", fix) from error
    beginning = tokenizer.encode(_BEGINNING, add_special_tokens=False)
    if ids[-len(beginning) :] != beginning:
        found = repr(tokenizer.decode(ids[-8:]))
        raise _unsuitable(template, f"a prompt that ends in {_BEGINNING}", found)
    return ids


def check_chats(config: Config, tokenizer: Any) -> None:
    """Raise if the chats of `evaluation.health_prompts` cannot be put to the model.

    Raises:
        StageError: tokenizer or chat template are not harmony's.
    """
    if not config.evaluation.health_prompts:
        return
    messages, today = [{"role": "user", "content": "Hello"}], datetime.date(2000, 1, 1)
    try:
        read_marks(tokenizer)
        for effort in EFFORTS:
            render_prompt(tokenizer, messages, today=today, reasoning_effort=effort)
    except StageError as error:
        raise StageError(
            "the questions of evaluation.health_prompts cannot be put to this model",
            error.expected,
            error.found,
            "use a model directory with gpt-oss's tokenizer and chat_template.jinja, or set "
            "evaluation.health_prompts=0",
        ) from error


def _unsuitable(template: Template, expected: str, found: str) -> StageError:
    fix = "use a model directory with gpt-oss's chat_template.jinja"
    return StageError(f"{template.name} does not suit this chat", expected, found, fix)


def _fault(found: str, expected: str, fix: str = "correct or remove it") -> Fault:
    return Fault(found, fix, expected)


def _check_variables(effort: Any, tools: Any) -> dict[str, Any]:
    """Return the template's variables."""
    variables: dict[str, Any] = {}
    if effort is not None:
        if effort not in EFFORTS:
            raise _fault(f"the reasoning effort {shown(effort)}", " or ".join(EFFORTS))
        variables["reasoning_effort"] = effort
    if tools not in EMPTY:
        if not isinstance(tools, list):
            raise _fault(f"{shown(tools)} as tools", "a list of functions")
        variables["tools"] = [_check_tool(tool, i) for i, tool in enumerate(tools, 1)]
    return variables


def _check_messages(messages: Any) -> list[dict[str, Any]]:
    """Return the messages with the keys that gpt-oss's template reads."""
    if not isinstance(messages, list) or not messages:
        raise _fault(f"{shown(messages)} as messages", "a list of messages, not empty")
    checked: list[dict[str, Any]] = []
    for i, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in _KEYS:
            raise _fault(f"message {i}: {shown(message)}", f"messages of {', '.join(_KEYS)}")
        if role in ("system", "developer") and i > 1:
            found = f"message {i} is a {role} message"
            raise _fault(found, "instructions in the first message only")
        unknown = [
            key
            for key, value in message.items()
            if key not in ("role", "content", *_KEYS[role]) and value not in EMPTY
        ]
        if unknown:
            named = ", ".join(("role", "content", *_KEYS[role]))
            raise _fault(f"message {i} ({role}) has {shown(unknown)}", f"only {named}")
        if role == "tool":
            _check_result(message, checked, i)
        calls = message.get("tool_calls")
        kept: dict[str, Any] = {"role": role}
        if calls in EMPTY or message.get("content") not in EMPTY:
            kept["content"] = join_parts(message.get("content"), i)
        if role == "assistant":
            kept |= _read_reasoning(message, i)
            if calls not in EMPTY:
                kept["tool_calls"] = [_check_call(calls, i)]
        checked.append(kept)
    return checked


def _read_reasoning(message: dict[str, Any], i: int) -> dict[str, str]:
    given = [message[name] for name in _REASONING if message.get(name) not in EMPTY]
    if not all(isinstance(text, str) for text in given) or len(set(given)) > 1:
        names = " and ".join(_REASONING)
        raise _fault(f"message {i} has {shown(given)} under {names}", "one text")
    return {"thinking": given[0]} if given else {}


def _check_call(calls: Any, i: int) -> dict[str, Any]:
    """Return a message's one tool call with its arguments as an object."""
    call = calls[0] if isinstance(calls, list) else None
    if isinstance(calls, list) and len(calls) > 1:
        raise _fault(
            f"message {i} has {len(calls)} tool calls",
            "one, since the chat template writes no more",
            "put each call into a message of its own, followed by its result",
        )
    function = call.get("function") if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not is_text(name):
        raise _fault(f"message {i} has the tool call {shown(call)}", "a function with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            pass  # what the model wrote; the template quotes it as text
    identity = {"id": call["id"]} if is_text(call.get("id")) else {}
    return {
        **identity,
        "function": {"name": name, "arguments": {} if arguments in EMPTY else arguments},
    }


def _check_result(message: dict[str, Any], before: list[dict[str, Any]], i: int) -> None:
    """Raise if a tool message names another call than the one that the template refers it to."""
    call = next((each["tool_calls"][0] for each in before[::-1] if "tool_calls" in each), None)
    if call is None:
        raise _fault(f"message {i} is a tool message without a call", "an earlier tool call")
    known = {"tool_call_id": call.get("id"), "name": call["function"]["name"]}
    for key, value in known.items():
        if message.get(key) not in EMPTY and value is not None and message[key] != value:
            raise _fault(
                f"message {i} has the {key} {shown(message[key])}", f"the last one, {value}"
            )


def _check_tool(tool: Any, i: int) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not is_text(function.get("name")):
        raise _fault(f"tool {i}: {shown(tool)}", "a function with a name")
    # The template adds the description to other text, so it must be there.
    function = {**function, "description": function.get("description") or ""}
    return {**tool, "function": function}
