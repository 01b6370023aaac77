"""Needle in a haystack: find the one value that belongs to a key.

`niah_single_1` hides one needle among sentences without meaning. In `niah_multikey_2` and `_3` the
haystack consists of needles with other keys. A key is a pair of words or a UUID, a value is a
number of seven digits or a UUID.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable

from sparselong.data.ruler.draft import NOISE, Draft
from sparselong.data.ruler.words import draw_pair

_NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
_PROMPT = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will "
    "quiz you about the {kind} afterwards.\n{text}\nWhat is the special magic {kind} for {key} "
    "mentioned in the provided text? The special magic {kind} for {key} mentioned in the provided "
    "text is"
)


def draw_single(source: random.Random, size: int, _: int) -> Draft:
    """Return a number among `size` lines of sentences without meaning."""
    key, value = draw_pair(source), _draw_number(source)
    return _hide(source, [NOISE] * size, "number", key, value)


def draw_numbers(source: random.Random, size: int, _: int) -> Draft:
    """Return a number among `size` numbers that have other keys."""
    return _hide_among_others(source, size, "number", draw_pair, _draw_number)


def draw_ids(source: random.Random, size: int, _: int) -> Draft:
    """Return a UUID among `size` UUIDs whose keys are other UUIDs."""
    return _hide_among_others(source, size, "uuid", _draw_id, _draw_id)


def _hide_among_others(
    source: random.Random,
    size: int,
    kind: str,
    draw_key: Callable[[random.Random], str],
    draw_value: Callable[[random.Random], str],
) -> Draft:
    key, value = draw_key(source), draw_value(source)
    others: list[str] = []
    while len(others) < size:
        other = draw_key(source)
        if other != key:  # the question would have two answers
            others.append(_NEEDLE.format(kind=kind, key=other, value=draw_value(source)))
    return _hide(source, others, kind, key, value)


def _hide(source: random.Random, lines: list[str], kind: str, key: str, value: str) -> Draft:
    needle = _NEEDLE.format(kind=kind, key=key, value=value)
    place = source.randrange(len(lines))
    text = "\n".join([*lines[:place], needle, *lines[place:]])
    return Draft(_PROMPT.format(kind=kind, text=text, key=key), [value])


def _draw_number(source: random.Random) -> str:
    return str(source.randrange(10**6, 10**7))


def _draw_id(source: random.Random) -> str:
    return str(uuid.UUID(int=source.getrandbits(128), version=4))
