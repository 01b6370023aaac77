"""What a task's generator returns."""

from __future__ import annotations

from typing import NamedTuple


class Draft(NamedTuple):
    """An item, before its length is known.

    Attributes:
        prompt: text up to the answer.
        answers: texts that the answer must contain.
    """

    prompt: str
    answers: list[str]


NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""RULER's sentences without meaning."""
