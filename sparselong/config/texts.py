"""What keys with a string value accept, and how a command line argument gives them their value."""

from __future__ import annotations

import os
import sys
import types
import unicodedata
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator

_NAME_BYTES, _PATH_BYTES = 255, 4095
"""Longest name of a file, and longest path, that Linux accepts."""
UTF8_FIX = (
    "rename it, or name it by a symbolic link; if its name is UTF-8, use such a locale: "
    "LC_ALL=C.UTF-8 PYTHONUTF8=1"
)
"""What to do about a name that Python could not decode."""
_WANDB_REFUSES = "/\\#?%:"
_WANDB_CHARACTERS = 128


def check_text(text: str) -> str:
    """Return the text; raise ValueError if it is blank or has characters that no name has."""
    if not text.strip():
        raise ValueError("a text that is not empty")
    if text != text.strip():
        raise ValueError("a text without spaces at its beginning and end")
    odd = next((c for c in text if unicodedata.category(c) in ("Cc", "Cs")), None)
    if odd is not None:
        kind = "bytes that are not UTF-8" if ord(odd) > 0xFF else f"the control character {odd!r}"
        raise ValueError(f"a text without {kind}")
    return text


def check_place(text: str) -> str:
    """Return the text with a leading `~` or `~user` expanded to that home directory.

    Environment variables are not expanded; a shell does that.

    Raises:
        ValueError: as for `check_text`, the home is unknown, or no path can be that long.
    """
    check_text(text)
    if not text.isascii() and sys.getfilesystemencoding() != "utf-8":
        raise ValueError(
            f"names in ASCII, because this process takes names for {sys.getfilesystemencoding()} "
            "(LC_ALL=C.UTF-8 PYTHONUTF8=1 for other names)"
        )
    place = os.path.expanduser(text)
    if place.startswith("~"):
        home = text.partition("/")[0]
        raise ValueError(
            f"a known user's home directory instead of {home} (or ./{home} for a name)"
        )
    names = [len(name.encode()) for name in place.split("/")]
    if max(names) > _NAME_BYTES or len(place.encode()) > _PATH_BYTES:
        raise ValueError(
            f"names of at most {_NAME_BYTES} bytes and a path of at most {_PATH_BYTES}, "
            f"not {max(names)} and {len(place.encode())}"
        )
    return place


def check_project(text: str) -> str:
    """Return a Weights & Biases project name; raise ValueError if the service would refuse it."""
    check_text(text)
    odd = sorted(set(text) & set(_WANDB_REFUSES))
    if odd or len(text) > _WANDB_CHARACTERS:
        raise ValueError(
            f"at most {_WANDB_CHARACTERS} characters, none of {' '.join(_WANDB_REFUSES)}"
        )
    return text


def check_function(text: str) -> str:
    """Return FILE.py:FUNCTION with the home directory expanded; raise ValueError for other text."""
    file, _, name = text.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        raise ValueError("FILE.py:FUNCTION, a Python file and a function in it")
    return f"{check_place(file)}:{name}"


Text = Annotated[str, AfterValidator(check_text)]
"""A name that is not a path."""
Place = Annotated[str, AfterValidator(check_place)]
"""A file, a directory, or a name on the hub."""
Project = Annotated[str, AfterValidator(check_project)]
"""A project name of Weights & Biases, which is stricter than trackio."""
Function = Annotated[str, AfterValidator(check_function)]
"""A Python file and a function in it, `FILE.py:FUNCTION`."""


def is_text(annotation: Any) -> bool:
    """Return whether a key holds a string: any, one of a list of choices, or optionally none."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return is_text(parts[0])
    if origin in (Union, types.UnionType):
        return all(is_text(part) for part in parts if part is not type(None))
    if origin is Literal:
        return all(isinstance(choice, str) for choice in parts)
    return annotation is str


def is_text_or_list(annotation: Any) -> bool:
    """Return whether a key holds a string or a list."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return False
    parts = [
        get_args(part)[0] if get_origin(part) is Annotated else part
        for part in get_args(annotation)
    ]
    return any(map(is_text, parts)) and any(get_origin(part) is tuple for part in parts)


def is_optional(annotation: Any) -> bool:
    """Return whether a key may be null."""
    return type(None) in get_args(annotation)
