"""An answer as it is generated, and what is known of it afterwards. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from sparselong.data import Delta
from sparselong.data import Message as Part

_CALL = "functions."


def calls_tool(part: Part | Delta) -> bool:
    """Return whether a text is the arguments of a tool call, and not for the user."""
    return part.recipient not in (None, "assistant")


@dataclass(frozen=True)
class Usage:
    """Tokens and seconds of an answer.

    Attributes:
        prompt_tokens: tokens of the prompt.
        reused_tokens: those that were still in the cache and not read again.
        new_tokens: generated tokens.
        first_seconds: from the request to the first token.
        seconds: from the request to the last token.
    """

    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    first_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Rate after the first token; 0 for a single one."""
        later = self.seconds - self.first_seconds
        return (self.new_tokens - 1) / later if self.new_tokens > 1 and later > 0 else 0.0

    def document(self) -> dict[str, Any]:
        """Return the figures by name."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


@dataclass(frozen=True)
class Answer:
    """A finished or stopped answer.

    Attributes:
        parts: what the model wrote, by channel, in order.
        reason: "stop", "length" (max_new_tokens reached), "tool_calls" or "cancelled".
        usage: tokens and seconds.
        seed: of sampling.
        repairs: how many places of the model's text were not in its format, by kind.
    """

    parts: list[Part]
    reason: str
    usage: Usage
    seed: int
    repairs: dict[str, int] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What is meant for the user: the final channel, and commentary that calls no tool."""
        shown = (part for part in self.parts if part.channel != "analysis")
        return "\n\n".join(part.text for part in shown if not calls_tool(part))

    @property
    def thinking(self) -> str:
        """The analysis channel, but for calls of tools in it."""
        thought = (part for part in self.parts if part.channel == "analysis")
        return "\n\n".join(part.text for part in thought if not calls_tool(part))

    @property
    def is_silent(self) -> bool:
        """Whether the model ended without a text for the user and without a call."""
        return self.reason == "stop" and not self.text.strip() and not self.tool_calls

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        """Calls of tools, in OpenAI's form; `arguments` is the text that the model wrote."""
        called = filter(calls_tool, self.parts)
        return [
            {
                "type": "function",
                "function": {
                    "name": (part.recipient or "").removeprefix(_CALL),
                    "arguments": part.text,
                },
            }
            for part in called
        ]

    def faults(self, max_new_tokens: int, most_tokens: int) -> list[str]:
        """Return what a person is told about an answer that is cut or not in the model's format.

        Args:
            max_new_tokens: the setting with which it was asked for.
            most_tokens: tokens of prompt and answer together that the cache holds.
        """
        told = []
        if self.reason == "length" and self.usage.new_tokens >= max_new_tokens:
            told.append(f"the answer was cut at max_new_tokens {max_new_tokens:,}")
        elif self.reason == "length":
            told.append(f"the answer was cut where the context is full (--context {most_tokens})")
        if self.repairs:
            kinds = ", ".join(f"{kind} ({count:,})" for kind, count in self.repairs.items())
            told.append(f"not in the model's format: {kinds}")
        return told

    def message(self) -> dict[str, Any]:
        """Return the answer as a message of the conversation, with the keys of chat templates."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.thinking:
            message["thinking"] = self.thinking
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        return message

    def document(self) -> dict[str, Any]:
        """Return all of it, ready for JSON."""
        return {
            "message": self.message(),
            "finish_reason": self.reason,
            "usage": self.usage.document(),
            "seed": self.seed,
            "repairs": self.repairs,
        }
