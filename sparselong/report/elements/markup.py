"""HTML elements whose text is escaped when they are made, so that no text can become markup.

Samples of a model, data and names are anybody's text. Only `Markup` is written as it is, and only
`element` and `join` make it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator
from typing import Any

VOID = frozenset({"br", "meta"})
"""Elements without content and end tag."""
_UNSHOWN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
"""Control characters, and halves of characters, which UTF-8 cannot hold."""


class Markup(str):
    """Complete HTML."""

    __slots__ = ()


Child = Any
"""Markup; children in a list, tuple or generator; None, which is left out; else escaped text."""


def element(name: str, /, *children: Child, **attributes: Any) -> Markup:
    """Return an element with its children.

    Args:
        name: of the element.
        children: its content.
        attributes: by name, with `_` for `-` (`class_` is `class`); None leaves one out, True
            writes the name alone.
    """
    head = name
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        head += f" {key.rstrip('_').replace('_', '-')}"
        head += "" if value is True else f'="{_escape(value)}"'
    if name in VOID:
        return Markup(f"<{head}>")
    return Markup(f"<{head}>{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Markup:
    """Return children one after another, with their texts escaped."""
    parts = []
    for child in children:
        if isinstance(child, Markup):
            parts.append(str(child))
        elif isinstance(child, list | tuple | Iterator):
            parts.append(join(child))
        elif child is not None:
            parts.append(_escape(child))
    return Markup("".join(parts))


def stylesheet(text: str) -> Markup:
    """Return a `style` element, whose content HTML reads as it is.

    Raises:
        ValueError: the text would end the element.
    """
    if "</" in text:
        raise ValueError("a style sheet that ends its own element")
    return Markup(f"<style>{text}</style>")


def _escape(value: Any) -> str:
    """Return a text for HTML; characters that no page can hold are shown as U+FFFD."""
    return html.escape(_UNSHOWN.sub("\N{REPLACEMENT CHARACTER}", str(value)))
