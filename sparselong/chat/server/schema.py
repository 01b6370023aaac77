"""Requests of OpenAI's chat completions, as far as they are understood here.

What would change the answer and is not supported is refused by name, never ignored.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    field_validator,
)

from sparselong.chat.conversation import Message
from sparselong.chat.settings import Settings
from sparselong.errors import ConfigError

MOST_STOPS = 4
_Number = StrictInt | StrictFloat
_MEANINGLESS = {
    **{"n": 1, "logprobs": False, "top_logprobs": 0, "logit_bias": {}, "store": False},
    **{"presence_penalty": 0, "frequency_penalty": 0, "response_format": {"type": "text"}},
    **{"modalities": ["text"]},
}
"""Parameters that are accepted only with the value that changes nothing."""
_NAMES = {"max_new_tokens": "max_tokens", "reasoning": "reasoning_effort"}
"""What settings are called in requests, where the names differ."""


class TextPart(BaseModel):
    """A part of a message's content; only texts are supported."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Function(BaseModel):
    """The function of a tool call; `arguments` is JSON as text."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A tool call of an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: Function


class ChatMessage(BaseModel):
    """A message of the conversation."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    refusal: None = None
    audio: None = None
    annotations: list[Any] | None = None

    def rendered(self) -> Message:
        """Return the message with the keys of chat templates."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)  # as in training
        message: Message = {"role": self.role, "content": content or ""}
        if self.name:
            message["name"] = self.name
        if self.reasoning_content:
            message["thinking"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    **({"id": call.id} if call.id else {}),
                    "type": "function",
                    "function": call.function.model_dump(),
                }
                for call in self.tool_calls
            ]
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        return message


class ToolFunction(BaseModel):
    """What a function that the model may call is named, does and takes.

    `strict`, which OpenAI's client sets by itself, is accepted and promises nothing: a call's
    arguments are what the model wrote.
    """

    name: str
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool | None = None


class Tool(BaseModel):
    """A tool that the model may call."""

    type: Literal["function"]
    function: ToolFunction


class StreamOptions(BaseModel):
    """How an answer is streamed."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """The body of /v1/chat/completions."""

    model_config = ConfigDict(extra="forbid")
    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    reasoning_effort: str | None = None
    max_tokens: StrictInt | None = None
    max_completion_tokens: StrictInt | None = None
    temperature: _Number | None = None
    top_p: _Number | None = None
    top_k: StrictInt | None = None
    seed: StrictInt | None = None
    stop: str | list[str] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    n: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    logit_bias: Any = None
    store: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    response_format: Any = None
    modalities: Any = None

    @field_validator(*_MEANINGLESS)
    @classmethod
    def _refuse_unsupported(cls, value: Any, info: Any) -> Any:
        allowed = _MEANINGLESS[info.field_name]
        if value is not None and value != allowed:
            raise ValueError(f"not supported; allowed: {json.dumps(allowed)}")
        return value

    def stops(self) -> list[str]:
        """Return the texts that end an answer.

        Raises:
            ConfigError: there are too many, or an empty one.
        """
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MOST_STOPS or not all(stops):
            raise ConfigError(
                "stop cannot be used", f"at most {MOST_STOPS} texts, none empty", str(stops)[:200],
                "correct stop",
            )  # fmt: skip
        return stops

    def settings(self, standard: Settings) -> Settings:
        """Return the settings of the answer.

        Args:
            standard: those that the request does not name.

        Raises:
            ConfigError: a value is out of range.
        """
        given = {
            "max_new_tokens": self.max_tokens
            if self.max_completion_tokens is None
            else self.max_completion_tokens,
            "reasoning": self.reasoning_effort,
            **{name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "seed")},
        }
        named = {name: value for name, value in given.items() if value is not None}
        return standard.changed(named, _NAMES)

    def conversation(self) -> list[Message]:
        """Return the messages with the keys of chat templates."""
        return [message.rendered() for message in self.messages]

    def functions(self) -> list[dict[str, Any]] | None:
        """Return the functions that the model may call; None if there are none."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool.model_dump(exclude={"function": {"strict"}}) for tool in self.tools]
