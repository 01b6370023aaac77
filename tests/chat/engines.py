"""Stands in for a model: answers what a test says, piece by piece."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from sparselong.chat.answer import Answer, Usage
from sparselong.chat.settings import Settings
from sparselong.data import Delta, Message
from sparselong.errors import StageError
from sparselong.runtime import current

HELLO = [Delta("analysis", "Let me think.", None), Delta("final", "Hello", None),
         Delta("final", " there!", None)]  # fmt: skip
CALL = [Delta("commentary", '{"city": "Bonn"}', "functions.weather")]


class ScriptedReply:
    """An answer; `step` is waited for before each piece but the first."""

    def __init__(
        self, deltas: list[Delta], settings: Settings, engine: ScriptedEngine, cancel: Any
    ):
        self.deltas, self.settings, self.engine, self.is_cancelled = (
            deltas,
            settings,
            engine,
            cancel,
        )
        self.said: list[Delta] = []
        self.cancelled = False

    def __iter__(self) -> Iterator[Delta]:
        for number, delta in enumerate(self.deltas):
            if number and self.engine.step is not None:
                while not self.engine.step.wait(0.02) and not self.is_cancelled():
                    pass
            if number:
                time.sleep(self.engine.delay)
            if self.is_cancelled():
                self.cancelled = True
                return
            self.said.append(delta)
            yield delta
        if self.engine.failure is not None:
            raise self.engine.failure

    @property
    def answer(self) -> Answer:
        parts: list[Message] = []
        for delta in self.said:
            if parts and (parts[-1].channel, parts[-1].recipient) == (
                delta.channel,
                delta.recipient,
            ):
                parts[-1] = parts[-1]._replace(text=parts[-1].text + delta.text)
            else:
                parts.append(Message(delta.channel, delta.text, delta.recipient, None))
        whole = len(self.said) == len(self.deltas)
        called = bool(parts and parts[-1].recipient)
        reason = "cancelled" if not whole else "tool_calls" if called else "stop"
        return Answer(parts, reason, Usage(7, 3, len(self.said), 0.5, 1.5), self.settings.seed or 0)


class ScriptedEngine:
    """Answers with the same pieces every time, and keeps what it was asked.

    Attributes:
        step: an answer continues only while this is set; None: it does not wait.
        delay: seconds before each piece but the first.
        settled: settings of its passes.
        seen: the attention backend that was set when it was asked.
        asked: messages, settings and tools of each answer.
    """

    name, most_tokens, created, load_seconds = "run/finetuned", 1000, 1, 0.1
    broken: BaseException | None = None

    def __init__(self, deltas: list[Delta] = HELLO, step: threading.Event | None = None):
        self.deltas, self.step = deltas, step
        self.asked: list[tuple[list[Any], Settings, Any]] = []
        self.refusal: StageError | None = None
        self.failure: Exception | None = None  # at the end of an answer
        self.replies: list[ScriptedReply] = []
        self.delay = 0.0
        self.settled: dict[str, Any] = {"attention_backend": "torch"}
        self.seen: list[str] = []

    def reply(
        self,
        messages: list[Any],
        settings: Settings,
        *,
        tools: Any = None,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> ScriptedReply:
        if self.refusal is not None:
            raise self.refusal
        self.seen.append(current().attention_backend)
        self.asked.append(([dict(m) for m in messages], settings, tools))
        self.replies.append(ScriptedReply(self.deltas, settings, self, is_cancelled))
        return self.replies[-1]
