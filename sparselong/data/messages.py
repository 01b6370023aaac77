"""The messages of a row: what their keys mean for training, or why a message is refused.

| key                                             | meaning                                        |
|-------------------------------------------------|------------------------------------------------|
| `role`                                          | system, developer, user, assistant or tool     |
| `content`                                       | text, or a list of text parts, to be joined    |
| `thinking`, `reasoning_content`, `reasoning`,   | an assistant's reasoning, as is text between   |
| `analysis`                                      | `<think>` and `</think>` before its answer     |
| `channel`                                       | final; or analysis, for a message that is the  |
|                                                 | reasoning of the next one                      |
| `weight`, `train`, `training`, `loss`           | 0 or false: this turn is not supervised        |
| `tool_calls`                                    | an assistant's one call (calls.py); its        |
|                                                 | content is then reasoning, as in the template  |
| `tool_call_id`, `name` of a tool message        | must be those of the call before it            |
| `function_call`, `images` and others            | refused, because the text alone would train    |
|                                                 | something else                                 |

All other keys mean nothing for training. They are ignored and counted, except for names that are
one of these but for case, plural or separators (`toolCalls`), which are refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from sparselong.data.calls import check_call, check_result, find_texts
from sparselong.data.lines import EMPTY, Fault, check_text, show_keys, shown

VARIABLES = ("reasoning_effort", "model_identity")
"""Keys of a row that set the template's variables."""
ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING = ("thinking", "reasoning_content", "reasoning", "analysis")
"""Keys of an assistant's reasoning."""
MASKS = (
    *("mask", "loss_mask", "loss_weight", "completion_mask"),
    *("assistant_mask", "assistant_masks", "assistant_tokens_mask"),
)
"""Other programs' keys that say what is trained."""
_EXPECTED_OF_MASKS = "`weight` 0 of messages, or `labels` beside `input_ids`"
_WEIGHTS = ("weight", "train", "training", "loss")
_UNSUPPORTED = (
    *("tool_call", "tool_responses", "tools", "functions"),
    *("function_call", "recipient", "image", "images", "video", "videos", "audio", "audios"),
    *("reasoning_details", "thinking_blocks", "train_detail", "training_detail"),
    *MASKS,
)
_CALLS = ("tool_calls", "tool_call_id")
_UNDERSTOOD = {"role", "content", "channel", *_CALLS, *REASONING, *_WEIGHTS, *_UNSUPPORTED}
# `<|channel|>` with its header, also that of a tool call; not a sentence about both tokens.
_HEADER = re.compile(
    r"<\|channel\|>(\s*(analysis|commentary|final)\b[^<]*|\w[^<\s]*)"
    r"(<\|constrain\|>[^<]*)?<\|message\|>"
)
# What is left of channels once control tokens are gone: nothing separates names and texts.
_RUN_TOGETHER = re.compile(r"analysis[^\W\d_a-z].*[^\s`'\"]assistantfinal[^\s`'\".,:;]", re.DOTALL)
_THINK = re.compile(r"\s*<think>(.*?)</think>\s*(.*)", re.DOTALL)
_THINK_OPENED = re.compile(r"\s*<think>")
# On a line of its own; within one, the tag is named, not used.
_THINK_CLOSED = re.compile(r"^[ \t]*</think>[ \t]*$", re.MULTILINE)


def check_messages(
    messages: Any, ignored: Counter[str], columnar: bool = False
) -> list[dict[str, Any]]:
    """Return messages with `role` and `content`, and the others of the keys above where given.

    Args:
        messages: what a row has under `messages`.
        ignored: count of rows by the name of a key that was ignored; this row is added.
        columnar: whether the row comes from a table, in which absent keys are null.

    Raises:
        Fault: the messages are not a conversation, or something in them is not understood.
    """
    if not isinstance(messages, list):
        raise Fault(f"`messages` is {type(messages).__name__}, not a list")
    checked = [_check(message, i, columnar) for i, message in enumerate(messages, 1)]
    for i, message in enumerate(checked, 1):
        if message["role"] == "tool":
            check_result(messages[i - 1], messages[i - 2] if i > 1 else None, i)
    found = set()
    for i, message in enumerate(messages, 1):
        known = _UNDERSTOOD | {"name"} if message["role"] == "tool" else _UNDERSTOOD
        found |= find_ignored(message, known, f"message {i}", VARIABLES)
    ignored.update(f"messages.{key}" for key in found)
    checked = _join_channels(checked)
    roles = [message["role"] for message in checked]
    if "assistant" not in roles:
        raise Fault("no assistant turn", expected="at least one assistant turn")
    if roles[0] == "assistant":
        raise Fault("it starts with an assistant message", expected="a user message before it")
    if all(message.get("weight") == 0 for message in checked if message["role"] == "assistant"):
        expected = "at least one assistant turn that is supervised"
        raise Fault("no assistant turn is supervised: all have weight 0", expected=expected)
    return checked


def check_unsupported(holder: dict[str, Any], names: tuple[str, ...], where: str) -> None:
    """Raise if one of the named keys has content."""
    for name in names:
        if holder.get(name) not in EMPTY and holder[name] is not False:
            raise Fault(
                f"{where} has `{name}`: {shown(holder[name])}",
                "remove the row, or the key if the row means the same without it",
                _EXPECTED_OF_MASKS if name in MASKS else "texts, and tool calls under `tool_calls`",
            )


def find_ignored(
    holder: dict[str, Any], known: Iterable[str], where: str, elsewhere: tuple[str, ...] = ()
) -> set[str]:
    """Return the names of keys with content that mean nothing here.

    Args:
        holder: the row or message.
        known: the names of keys that have a meaning in it.
        where: name of the holder, for the error.
        elsewhere: names that have a meaning in a row, but not here.

    Raises:
        Fault: a name is a known one but for case, plural or separators, or belongs elsewhere.
    """
    others = {key for key, value in holder.items() if key not in known and value not in EMPTY}
    plain = {_plain(key): key for key in sorted(known)}
    for key in sorted(others):
        if key in elsewhere:
            fix = "move it into the row, beside the messages"
            raise Fault(f"{where} has `{key}`: {shown(holder[key])}", fix, f"`{key}` of the row")
        if _plain(key) in plain:
            meant = plain[_plain(key)]
            fix = f"rename it, or remove it if it does not mean `{meant}`"
            raise Fault(f"{where} has {shown(key)}: {shown(holder[key])}", fix, f"`{meant}`")
    return others


def _plain(key: str) -> str:
    return re.sub(r"[\W_]", "", key).lower().removesuffix("s")


def check_weight(holder: dict[str, Any], names: tuple[str, ...], where: str) -> int | None:
    """Return 0 or 1 as the weights under these names say, or None if there are none."""
    given = {name: holder[name] for name in names if holder.get(name) not in EMPTY}
    for name, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise Fault(
                f"{where} has `{name}` {shown(value)}",
                "use 0 for a turn that is context only, 1 or nothing for the others",
                f"`{name}` 0 or 1",
            )
    if len(set(given.values())) > 1:
        values = ", ".join(f"`{name}` {shown(value)}" for name, value in given.items())
        raise Fault(f"{where} contradicts itself: {values}")
    return int(next(iter(given.values()))) if given else None


def _check(message: Any, i: int, columnar: bool) -> dict[str, Any]:
    """Return a message with its `channel`, which `_join_channels` removes."""
    if not isinstance(message, dict):
        raise Fault(f"message {i} is a {type(message).__name__} instead of an object")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        roles = f"one of the roles {', '.join(ROLES)}"
        raise Fault(
            f"message {i} has the role {shown(role)}", "rename it, or remove the row", roles
        )
    where = f"message {i} ({role})"
    if message.get("recipient") == "all":
        message = {key: value for key, value in message.items() if key != "recipient"}
    check_unsupported(message, _UNSUPPORTED, where)
    called = _check_called(message, i, columnar)
    content = "" if called and message.get("content") is None else message.get("content")
    content = join_parts(content, i)
    if role in ("system", "developer") and i > 1:
        raise Fault(f"message {i} is a {role} message; only the first message may be one")
    thinking, content = _split_reasoning(message, content, i)
    if called and thinking and content:
        raise Fault(
            f"{where} has reasoning and content beside its tool call",
            "put both into one of them",
            "one text before a tool call, since the chat template writes one",
        )
    if called:
        thinking, content = thinking or content, ""
    weight = check_weight(message, _WEIGHTS, where)
    if weight == 1 and role != "assistant":
        raise Fault(
            f"{where} has weight 1",
            "remove it; data.train_on=all supervises every message",
            "weights of assistant messages",
        )
    checked = {"role": role, "number": i, "channel": _channel(message, i), "content": content}
    if called:
        checked["tool_calls"] = called
    if thinking:
        checked["thinking"] = thinking
    if weight == 0:
        checked["weight"] = 0
    return checked


def _check_called(message: dict[str, Any], i: int, columnar: bool) -> list[dict[str, Any]]:
    """Return an assistant's one tool call in a list, or an empty one."""
    role = message["role"]
    for key, owner in zip(_CALLS, ("assistant", "tool"), strict=True):
        if message.get(key) not in EMPTY and role != owner:
            raise Fault(f"message {i} ({role}) has `{key}`: {shown(message[key])}")
    if message.get("tool_calls") in EMPTY:
        return []
    call = check_call(message["tool_calls"], i, columnar)
    for text in find_texts(call):
        check_text(text, f"the tool call of message {i}")
    return [call]


def join_parts(content: Any, i: int) -> str:
    """Return the content of message i as one text; raise if it is not text or text parts."""
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                raise Fault(
                    f"the content of message {i} has a part of type {shown(kind)}",
                    "remove the row, or write its content as one text",
                    'text, or parts {"type": "text", "text": "…"}',
                )
            others = {key for key, value in part.items() if value not in EMPTY} - {"type", "text"}
            if others:
                raise Fault(
                    f"a part of message {i} has {show_keys(sorted(others))} beside its text"
                )
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise Fault(f"the content of message {i} is {type(content).__name__}, not text")
    return check_text(content, f"the content of message {i}")


def _split_reasoning(message: dict[str, Any], content: str, i: int) -> tuple[str, str]:
    """Return an assistant's reasoning and answer, which are "" and the content for others."""
    given = {name: message[name] for name in REASONING if message.get(name) not in EMPTY}
    for name, text in given.items():
        if message["role"] != "assistant" or not isinstance(text, str):
            raise Fault(
                f"the {name} of message {i} ({message['role']}) is not text in an assistant message"
            )
        check_text(text, f"the {name} of message {i}")
    if len(set(given.values())) > 1:
        raise Fault(f"message {i} has different texts under {' and '.join(given)}")
    thinking = next(iter(given.values()), "")
    if message["role"] != "assistant":
        return "", content
    if found := _THINK.fullmatch(content):
        if thinking:
            raise Fault(f"message {i} has reasoning under {next(iter(given))} and in <think> tags")
        thinking, content = found[1].strip(), found[2]
    elif _THINK_OPENED.match(content) or (
        "<think>" not in content and _THINK_CLOSED.search(content)
    ):
        raise Fault(
            f"message {i} has only one of the tags <think> and </think>",
            "put the reasoning under `thinking`, the answer alone under `content`",
        )
    for text in (thinking, content):
        _refuse_spelled_channel(text, i)
    return thinking, content


def _refuse_spelled_channel(text: str, i: int) -> None:
    """Raise if harmony's channels are written out in an assistant's text."""
    fix = "put the reasoning under `thinking`, the answer alone under `content`"
    if found := _HEADER.search(text):
        raise Fault(f"message {i} spells a channel header: {shown(found[0])}", fix)
    if _RUN_TOGETHER.match(text):
        raise Fault(f"message {i} spells `analysis…assistantfinal…`, what is left of channels", fix)


def _channel(message: dict[str, Any], i: int) -> str:
    channel = message.get("channel")
    if channel in EMPTY:
        return "final"
    if channel == "commentary" and message.get("tool_calls") not in EMPTY:
        return "final"
    if message["role"] != "assistant" or channel not in ("analysis", "final"):
        raise Fault(
            f"message {i} ({message['role']}) has the channel {shown(channel)}",
            expected="an assistant's analysis and final, and commentary of its tool calls",
        )
    if channel == "analysis" and message.get("tool_calls") not in EMPTY:
        raise Fault(f"message {i} is on the analysis channel, but has a tool call")
    return channel


def _join_channels(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with each one on the analysis channel as `thinking` of the next."""
    joined: list[dict[str, Any]] = []
    before: dict[str, Any] | None = None
    for message in messages:
        i = message["number"]
        if before is not None:
            _refuse_separate(before, message)
            message = {**message, "thinking": before["content"]}
        if message["channel"] == "analysis":
            before = message
            if "thinking" in message or not message["content"].strip():
                raise Fault(f"message {i} is on the analysis channel: its reasoning is its content")
            continue
        before = None
        written = message["content"].strip() or message.get("tool_calls")
        if message["role"] == "assistant" and not written:
            raise Fault(f"message {i} (assistant) is empty")
        kept = ("role", "thinking", "content", "tool_calls", "weight")
        joined.append({key: message[key] for key in kept if key in message})
    if before is not None:
        raise Fault(f"message {before['number']} is on the analysis channel, without an answer")
    return joined


def _refuse_separate(analysis: dict[str, Any], answer: dict[str, Any]) -> None:
    """Raise unless a message can be the answer that follows an analysis message."""
    i, j = analysis["number"], answer["number"]
    if answer["role"] != "assistant" or answer["channel"] != "final":
        raise Fault(f"message {i} is on the analysis channel, but no answer follows it")
    if "thinking" in answer:
        raise Fault(f"message {j} has reasoning of its own after message {i} on the same channel")
    if analysis.get("weight") != answer.get("weight"):
        raise Fault(f"messages {i} and {j} are one turn, but have different weights")
