"""Harmony, the format in which gpt-oss answers, parsed token by token without losing any text.

The prompt ends in `<|start|>assistant`. From there the model writes messages, each after a header:

    <|channel|>analysis<|message|>A tool knows.<|end|>
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>

A header is `assistant`, perhaps with `to=RECIPIENT`, then the channel, perhaps with a recipient or
a content type, then perhaps `<|constrain|>` and a content type, then `<|message|>`. Models get
headers wrong now and then. Text that is not part of a valid header always ends up in a message:
what stands where a header should be becomes a message of its own on the final channel, and reading
continues at the next mark. Every departure is counted by kind:

| kind                            | what was generated, and how it is read                         |
|---------------------------------|----------------------------------------------------------------|
| text before a header            | text right after the prompt: final                             |
| text outside a message          | text between an end and `<|start|>`: final                     |
| doubled role                    | `assistant` again, with or without `<|start|>`: final          |
| unknown role                    | another role than `assistant`: final                           |
| unknown channel                 | another channel, or more than one in its place: final          |
| unknown content type            | several words or nothing after `<|constrain|>`: final          |
| doubled channel                 | `<|channel|>` twice in a header: the first is final, the       |
|                                 | second counts                                                  |
| contradictory header            | two recipients or content types: final                         |
| header without `<|message|>`    | a header that another mark ends: final                         |
| truncated header                | a header at the end of the generation: final                   |
| header without a channel        | final, or commentary if it has a recipient                     |
| message without a header        | `<|message|>` after an end: final                              |
| message without `<|start|>`     | `<|channel|>` after an end or within a message: a new message  |
| message without `<|end|>`       | `<|start|>` within a message: a new message                    |
| call without a recipient        | `<|call|>` after a message to nobody: ends it                  |
| stray mark                      | a mark that means nothing in its place: skipped                |
| special token                   | a special token that is no mark: text                          |
| token without text              | an id beyond the vocabulary: skipped                           |
| incomplete character            | a character whose bytes a mark or the end cuts off: U+FFFD     |

Left out: repairing a wrong header by guessing what was meant.
"""

from __future__ import annotations

import codecs
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import regex

from sparselong.errors import StageError

# Marks within a header's text. Lone surrogates, because decoded text cannot contain them.
_CHANNEL, _CONSTRAIN = "\ud800", "\ud801"
_ROLE = "assistant"
# The role may be repeated here so that a doubled one is recognized; `complete` refuses it.
_HEADER = regex.compile(
    rf"(?:\s*{_ROLE})+(?:\s+to=(?P<to>[!-~]+))?\s*"
    rf"(?:{_CHANNEL}\s*(?P<channel>analysis|commentary|final)"
    r"(?:\s+to=(?P<to>[!-~]+))?(?:\s+(?P<type>[a-z]\w*))?\s*)?"
    rf"(?:{_CONSTRAIN}\s*(?P<type>[!-~]+)\s*)?"
)
_DOUBLED = regex.compile(rf"\s*{_ROLE}\s*{_ROLE}")
_NO_MESSAGE = "header without <|message|>"
_PROBE = "naïve 日本語 🙂\n"


class Marks(NamedTuple):
    """Token ids of the format's marks."""

    start: int
    end: int
    message: int
    channel: int
    constrain: int
    return_: int
    call: int


class Delta(NamedTuple):
    """Newly generated text.

    Attributes:
        channel: analysis, commentary or final.
        text: whole characters, at least one.
        recipient: as in `Message`.
        message: number of the message that it belongs to, from 0.
    """

    channel: str
    text: str
    recipient: str | None
    message: int = 0


class Message(NamedTuple):
    """A message, as far as it has been generated.

    Attributes:
        channel: analysis, commentary or final.
        text: its content.
        recipient: whom it is for, `functions.NAME` for a tool call; None for the user.
        content_type: what the header says about the content, `json` for most tool calls.
    """

    channel: str
    text: str
    recipient: str | None = None
    content_type: str | None = None


def read_marks(tokenizer: Any) -> Marks:
    """Return the ids of harmony's marks.

    Args:
        tokenizer: a fast transformers tokenizer.

    Raises:
        StageError: a mark is not a token of this tokenizer, or its other tokens are not bytes.
    """
    backend = tokenizer.backend_tokenizer
    names = {field: f"<|{field.rstrip('_')}|>" for field in Marks._fields}
    ids = {field: backend.token_to_id(name) for field, name in names.items()}
    lacking = [names[field] for field, token in ids.items() if token is None]
    pieces = backend.encode(_PROBE, add_special_tokens=False).tokens
    if lacking or b"".join(map(_to_bytes, pieces)) != _PROBE.encode():
        raise StageError(
            f"{tokenizer.name_or_path or 'the tokenizer'} does not write harmony",
            "a byte-level tokenizer with gpt-oss's control tokens",
            f"no {', '.join(lacking)}" if lacking else f"{_PROBE!r} as {pieces}",
            "use a gpt-oss model with the tokenizer files that belong to it",
        )
    return Marks(**ids)


def _alphabet() -> dict[str, int]:
    """Return the byte for each character of byte-level vocabularies, as GPT-2 defined them."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _alphabet()


def _to_bytes(piece: str) -> bytes:
    """Return the bytes that a vocabulary's entry stands for."""
    try:
        return bytes([_BYTES[character] for character in piece])
    except KeyError:  # an added token, which is stored as it reads
        return piece.encode()


@dataclass
class _Header:
    """A header as far as it has been generated.

    Args:
        text: its text, with `_CHANNEL` and `_CONSTRAIN` for the marks in it.
        given: number of characters at the beginning that the model did not write.
    """

    text: str = ""
    given: int = 0

    def write(self, text: str) -> bool:
        """Add text and return whether this can still become a valid header."""
        self.text += text
        return _HEADER.fullmatch(self.text, partial=True) is not None

    def enter(self, mark: str) -> bool:
        """Add a mark if what precedes it is complete, and return whether it is."""
        longer = self.text + mark
        if _DOUBLED.match(self.text) or not _HEADER.fullmatch(longer, partial=True):
            return False
        self.text = longer
        return True

    def complete(self) -> Any:
        """Return the match of a valid header, or None."""
        match = _HEADER.fullmatch(self.text)
        if match is None or _DOUBLED.match(self.text):
            return None
        alike = all(len(set(match.captures(name))) < 2 for name in ("to", "type"))
        return match if alike else None

    def fault(self) -> str:
        """Return what is wrong with an invalid header; it does not depend on later text."""
        if _DOUBLED.match(self.text):
            return "doubled role"
        if _HEADER.fullmatch(self.text):
            return "contradictory header"
        if _CONSTRAIN in self.text:
            return "unknown content type"
        if _CHANNEL in self.text:
            return "unknown channel"
        return "text before a header" if self.given else "unknown role"

    def is_untouched(self) -> bool:
        """Return whether this is what the prompt ends in and nothing more."""
        return self.given > 0 and self.text == _ROLE

    def is_role(self) -> bool:
        """Return whether this is a valid role and nothing more."""
        return {_CHANNEL, _CONSTRAIN}.isdisjoint(self.text) and self.complete() is not None

    def generated(self) -> str:
        """Return the text that the model wrote, without marks."""
        return self.text[self.given :].replace(_CHANNEL, "").replace(_CONSTRAIN, "")


@dataclass
class _Open:
    channel: str
    recipient: str | None = None
    content_type: str | None = None
    pieces: list[str] = field(default_factory=list)


class Parser:
    """Parse what a model generates after `<|start|>assistant`, token by token.

    The messages and repairs do not depend on how a text is cut into tokens.

    Attributes:
        repairs: count of departures from the format by kind, as in this module's table.
        ended_by: the mark that ended the last message, None if none did or more followed.

    Args:
        tokenizer: a fast, byte-level transformers tokenizer.
        marks: its marks, from `read_marks`.
    """

    def __init__(self, tokenizer: Any, marks: Marks):
        self.repairs: Counter[str] = Counter()
        self.ended_by: Literal["return", "call", "end"] | None = None
        self._backend = tokenizer.backend_tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self._special = {token for token, entry in added if entry.special}
        self._handlers = {
            marks.start: self._start,
            marks.channel: self._enter_channel,
            marks.constrain: self._constrain,
            marks.message: self._begin_text,
            marks.end: lambda: self._finish("end"),
            marks.return_: lambda: self._finish("return"),
            marks.call: lambda: self._finish("call"),
        }
        # Bytes of an unfinished character wait in the decoder.
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._header: _Header | None = _Header(_ROLE, given=len(_ROLE))
        # Where there is no header: in a message, after an invalid header, or after an end.
        self._state: Literal["message", "broken", "ended"] = "ended"
        self._all: list[_Open] = []
        self._current: _Open | None = None  # opened by the first text if None

    @property
    def messages(self) -> list[Message]:
        """Finished messages and the current one, in order."""
        return [
            Message(each.channel, "".join(each.pieces), each.recipient, each.content_type)
            for each in self._all
        ]

    def feed(self, token: int) -> list[Delta]:
        """Read a token and return the text that is known to belong to a message by now.

        Args:
            token: a token id, not negative; any id is read.
        """
        self.ended_by = None
        handle = self._handlers.get(token)
        if handle is None:
            return self._write(self._decode(token))
        return [*self._flush(), *handle()]

    def close(self) -> list[Delta]:
        """Return the text that has waited for the rest of a header or character."""
        deltas = self._flush()
        if self._header is not None and not self._header.is_untouched():
            deltas += self._reject("truncated header")
        return deltas

    def _decode(self, token: int) -> str:
        piece = self._backend.id_to_token(token)
        if piece is None:
            self.repairs["token without text"] += 1
            return ""
        if token in self._special:
            self.repairs["special token"] += 1
        return self._characters.decode(_to_bytes(piece))

    def _flush(self) -> list[Delta]:
        rest = self._characters.decode(b"", final=True)
        if rest:
            self.repairs["incomplete character"] += 1
        return self._write(rest)

    def _write(self, text: str) -> list[Delta]:
        """Add text to the header or the message."""
        if not text:
            return []
        if self._header is not None:
            return [] if self._header.write(text) else self._reject(self._header.fault())
        if self._current is None:
            if self._state == "ended":
                self.repairs["text outside a message"] += 1
                self._state = "broken"
            self._open(_Open("final"))
        assert self._current is not None
        self._current.pieces.append(text)
        number = len(self._all) - 1
        return [Delta(self._current.channel, text, self._current.recipient, number)]

    def _open(self, message: _Open) -> None:
        self._current = message
        self._all.append(message)

    def _reject(self, kind: str) -> list[Delta]:
        """Turn the header into a message of its own."""
        assert self._header is not None
        self.repairs[kind] += 1
        text = self._header.generated()
        self._header, self._current, self._state = None, None, "broken"
        return self._write(text)

    def _start(self) -> list[Delta]:
        deltas = []
        if self._header is not None:
            deltas = self._reject("doubled role" if self._header.is_role() else _NO_MESSAGE)
        elif self._state == "message":
            self.repairs["message without <|end|>"] += 1
        self._header = _Header()
        return deltas

    def _enter_channel(self) -> list[Delta]:
        deltas = []
        if self._header is not None:
            if self._header.enter(_CHANNEL):
                return []
            doubled = _CHANNEL in self._header.text
            deltas = self._reject("doubled channel" if doubled else self._header.fault())
        elif self._state != "broken":
            self.repairs["message without <|start|>"] += 1
        self._header = _Header(_ROLE + _CHANNEL, given=len(_ROLE))
        return deltas

    def _constrain(self) -> list[Delta]:
        if self._header is not None:
            return [] if self._header.enter(_CONSTRAIN) else self._reject(self._header.fault())
        if self._state != "broken":
            self.repairs["stray mark"] += 1
        return []

    def _begin_text(self) -> list[Delta]:
        deltas: list[Delta] = []
        match = self._header and self._header.complete()
        if match:
            self._header = None
            recipient = match["to"] if match["to"] != "all" else None
            channel = match["channel"] or ("commentary" if recipient else "final")
            if not match["channel"]:
                self.repairs["header without a channel"] += 1
            self._open(_Open(channel, recipient, match["type"]))
        elif self._header is not None:
            deltas = self._reject(self._header.fault())
            self._current = None
        elif self._state == "message":
            self.repairs["stray mark"] += 1
        else:
            if self._state == "ended":
                self.repairs["message without a header"] += 1
            self._current = None
        self._state = "message"
        return deltas

    def _finish(self, mark: Literal["return", "call", "end"]) -> list[Delta]:
        deltas = []
        if self._header is not None:
            deltas = self._reject(_NO_MESSAGE)
        elif self._state == "ended":
            self.repairs["stray mark"] += 1
        elif mark == "call" and (self._current is None or self._current.recipient is None):
            self.repairs["call without a recipient"] += 1
        self._current, self._state, self.ended_by = None, "ended", mark
        return deltas
