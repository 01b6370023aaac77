"""Conversations as files: what is kept, what is accepted, and where they may lie. No torch.

    runs/NAME/06_chat/conversations/TITLE.json
    {"format": "sparselong-conversation", "version": 1, "model", "settings", "messages"}

Messages have the keys of chat templates: `role`, `content`, and for answers `thinking` and
`tool_calls`. A file that another program wrote, that is too large, or that has other keys is
refused as a whole; nothing in it is executed or rendered as HTML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from sparselong.chat.settings import Settings
from sparselong.errors import ConfigError, StageError
from sparselong.files import write_atomically

FORMAT, VERSION = "sparselong-conversation", 1
MOST_BYTES = 8 << 20
"""Largest conversation file: about two million tokens, far more than any context."""
FOLDER = "conversations"
ROLES = ("system", "developer", "user", "assistant", "tool")
_TITLE = re.compile(r"[\w][\w .,()+-]{0,99}")
_KEYS: dict[str, tuple[type, ...]] = {
    "role": (str,),
    "content": (str, type(None)),
    "thinking": (str, type(None)),
    "tool_calls": (list, type(None)),
    "name": (str,),
    "tool_call_id": (str,),
}
_DOCUMENT = {"format", "version", "model", "settings", "messages"}
_MOST_NAME_BYTES = 200
"""File systems allow 255; the rest is for the suffix."""
Message = dict[str, Any]


@dataclass
class Conversation:
    """The messages so far, and the settings that they were made with.

    Attributes:
        messages: with the keys above, oldest first.
        model: name of the model that answered last.
        settings: those of the last answer, by name.
    """

    messages: list[Message] = field(default_factory=list)
    model: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """Return what is written to a file."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "settings": self.settings,
            "messages": self.messages,
        }


def path_of(folder: Path, title: str) -> Path:
    """Return the file of a conversation in `folder`, without links or folders in its name.

    Raises:
        StageError: the title is no plain name.
    """
    name = title.strip().removesuffix(".json")
    is_short = len(name.encode(errors="replace")) <= _MOST_NAME_BYTES
    if not _TITLE.fullmatch(name) or name != Path(name).name or not is_short:
        raise StageError(
            "a conversation's name cannot be used",
            "1 to 100 letters, digits, spaces or . , ( ) + - _, beginning with a letter or digit, "
            f"in at most {_MOST_NAME_BYTES} bytes",
            repr(title[:120]),
            "choose a plain name; conversations lie in the run directory",
        )
    return folder / f"{name}.json"


def save(conversation: Conversation, folder: Path, title: str) -> Path:
    """Write a conversation to `folder`, replacing one of the same name, and return its file.

    Raises:
        StageError: the title is no plain name, or the conversation is too large to be read again.
        OSError: the file cannot be written.
    """
    path = path_of(folder, title)
    text = json.dumps(conversation.document(), indent=1, ensure_ascii=False) + "\n"
    if len(text.encode()) > MOST_BYTES:
        raise _refuse(path, f"at most {MOST_BYTES:,} bytes", f"{len(text.encode()):,} bytes")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
    return path


def load(path: Path) -> Conversation:
    """Read a conversation's file.

    Raises:
        StageError: it is missing, too large, no UTF-8, no JSON, or not a conversation.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise _refuse(path, "a file that can be read", error.strerror or str(error)) from error
    return parse(data, path)


def parse(data: bytes, source: Path | str) -> Conversation:
    """Read a conversation from a file's bytes.

    Args:
        data: the bytes.
        source: the file, for messages.

    Raises:
        StageError: see `load`.
    """
    if len(data) > MOST_BYTES:
        raise _refuse(source, f"at most {MOST_BYTES:,} bytes", "more")
    try:
        document = json.loads(data.decode("utf-8"))
        # Python reads more than JSON, NaN and halves of surrogate pairs, which no reader would get.
        json.dumps(document, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise _refuse(source, "JSON in UTF-8", " ".join(str(error).split())[:200]) from error
    if not isinstance(document, Mapping) or document.get("format") != FORMAT:
        raise _refuse(source, f'an object with "format": "{FORMAT}"', "another document")
    if document.get("version") != VERSION:
        raise _refuse(source, f"version {VERSION}", f"version {document.get('version')!r}"[:80])
    if others := sorted(document.keys() - _DOCUMENT):
        raise _refuse(source, f"the keys {', '.join(sorted(_DOCUMENT))}", repr(others)[:120])
    messages = document.get("messages")
    if not isinstance(messages, list):
        raise _refuse(source, "a list of messages", type(messages).__name__)
    for number, message in enumerate(cast(list[Any], messages)):
        check_message(message, f"message {number}", source)
    settings, model = document.get("settings", {}), document.get("model", "")
    if not isinstance(settings, dict) or not isinstance(model, str):
        raise _refuse(source, "settings as an object, model as a text", "other types")
    try:
        Settings().changed(settings)
    except ConfigError as error:
        raise _refuse(source, f"settings: {error.expected}", error.found) from error
    return Conversation(messages, model, settings)


def check_message(message: Any, name: str, source: Path | str) -> None:
    """Raise StageError unless a message has the keys of chat templates, and texts in them."""
    if not isinstance(message, dict):
        raise _refuse(source, f"{name}: an object", type(message).__name__)
    for key, value in message.items():
        if key not in _KEYS or not isinstance(value, _KEYS[key]):
            found = f"{key!r}: {type(value).__name__}"[:120]
            raise _refuse(source, f"{name}: the keys {', '.join(_KEYS)} with texts", found)
    if message.get("role") not in ROLES:
        found = repr(message.get("role"))[:80]
        raise _refuse(source, f"{name}: role {', '.join(ROLES)}", found)
    if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
        raise _refuse(source, f"{name}: content, or tool calls", "neither")
    for call in message.get("tool_calls") or ():
        function = call.get("function") if isinstance(call, dict) else None
        texts = ("name", "arguments")
        if not isinstance(function, dict) or not all(
            isinstance(function.get(text), str) for text in texts
        ):
            expected = f"{name}: tool calls with a function's {' and '.join(texts)} as texts"
            raise _refuse(source, expected, repr(call)[:80])


def _refuse(source: Path | str, expected: str, found: str) -> StageError:
    return StageError(
        f"{source} cannot be used as a conversation",
        expected,
        found,
        "use a file that /save or the page's export wrote",
    )
