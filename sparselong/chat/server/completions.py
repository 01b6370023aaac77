"""Answers in the form of OpenAI's chat completions, whole or as server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from sparselong.chat.answer import Answer, calls_tool
from sparselong.chat.conversation import Message
from sparselong.chat.server.metrics import Metrics
from sparselong.chat.server.stops import StopTexts
from sparselong.chat.server.turns import Turns
from sparselong.chat.settings import Settings
from sparselong.data import Delta

_REASONS = {"cancelled": "stop"}


@dataclass
class Completion:
    """A request that is answered.

    Attributes:
        model: its name.
        messages: the conversation.
        settings: how it is answered.
        tools: functions that the model may call.
        stops: texts that end the answer.
        with_usage: whether a stream ends with the usage figures.
        id: of the answer.
        created: seconds since 1970.
    """

    model: str
    messages: list[Message]
    settings: Settings
    tools: list[dict[str, Any]] | None
    stops: list[str]
    with_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    async def run(
        self, turns: Turns, metrics: Metrics
    ) -> AsyncGenerator[dict[str, Any] | Answer, None]:
        """Yield the changes that a stream sends (OpenAI's `delta`), and the answer at the end.

        A change is empty where there is nothing to send yet.
        """
        stops, joints = StopTexts(self.stops), _Joints()
        answer: Answer | None = None
        async with aclosing(turns.answer(self.messages, self.settings, self.tools)) as items:
            async for item in items:
                if isinstance(item, Answer):
                    answer = item
                elif stops.found or calls_tool(item):
                    yield {}
                elif item.channel == "analysis":
                    yield {"reasoning_content": joints.join("reasoning_content", item)}
                else:
                    text = stops.feed(joints.join("content", item))
                    yield {"content": text} if text else {}
                    if stops.found:
                        turns.stop()
        assert answer is not None
        metrics.count_answer(answer.usage)
        if rest := stops.close():
            yield {"content": rest}
        if answer.tool_calls:
            yield {"tool_calls": _with_ids(answer, indexed=True)}
        yield replace(answer, reason="stop") if stops.found else answer

    def document(self, answer: Answer, text: str) -> dict[str, Any]:
        """Return the whole answer; `text` is what the stop texts left of it."""
        message: dict[str, Any] = {"role": "assistant", "content": text or None}
        if answer.thinking:
            message["reasoning_content"] = answer.thinking
        if answer.tool_calls:
            message["tool_calls"] = _with_ids(answer)
        choice = {"index": 0, "message": message, "finish_reason": _reason(answer)}
        return {**self._head("chat.completion"), "choices": [choice], "usage": _usage(answer)}

    async def events(self, turns: Turns, metrics: Metrics) -> AsyncGenerator[str, None]:
        """Yield the answer as server-sent events."""
        yield self._event({"role": "assistant", "content": ""})
        async with aclosing(self.run(turns, metrics)) as items:
            async for item in items:
                if isinstance(item, Answer):
                    yield self._event({}, _reason(item))
                    if self.with_usage:
                        head = self._head("chat.completion.chunk")
                        yield write_event({**head, "choices": [], "usage": _usage(item)})
                elif item:
                    yield self._event(item)
        yield "data: [DONE]\n\n"

    def _event(self, delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return write_event({**self._head("chat.completion.chunk"), "choices": [choice]})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


class _Joints:
    """Puts an empty line between two messages of the same key, as `Answer` does."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}

    def join(self, key: str, delta: Delta) -> str:
        """Return the text to add under a key."""
        before = self._last.get(key, delta.message)
        self._last[key] = delta.message
        return delta.text if before == delta.message else f"\n\n{delta.text}"


def _with_ids(answer: Answer, indexed: bool = False) -> list[dict[str, Any]]:
    return [
        {**({"index": number} if indexed else {}), "id": f"call_{secrets.token_hex(12)}", **call}
        for number, call in enumerate(answer.tool_calls)
    ]


def _reason(answer: Answer) -> str:
    return _REASONS.get(answer.reason, answer.reason)


def _usage(answer: Answer) -> dict[str, Any]:
    usage = answer.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.new_tokens,
        "total_tokens": usage.prompt_tokens + usage.new_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.reused_tokens},
        "seconds": {"first_token": usage.first_seconds, "whole": usage.seconds},
    }


def write_event(document: dict[str, Any]) -> str:
    """Return a document as a server-sent event."""
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"
