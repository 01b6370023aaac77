"""English words, from the package that RULER uses."""

from __future__ import annotations

import functools
import random
from importlib import resources
from importlib.util import find_spec

from sparselong.errors import StageError


@functools.cache
def load_words(*kinds: str) -> list[str]:
    """Return the sorted different words of some kinds, of all if none is named.

    Args:
        *kinds: `noun`, `adjective`, `verb`.

    Raises:
        StageError: the package is missing.
    """
    if find_spec("wonderwords") is None:
        raise StageError(
            "RULER's words are missing",
            "the package wonderwords of requirements/requirements.lock",
            "it is not installed",
            "run ./install.sh again, or remove the tasks niah_* and ruler_* from evaluation.tasks",
        )
    folder = resources.files("wonderwords.assets")
    found: set[str] = set()
    for kind in kinds or ("noun", "adjective", "verb"):
        lines = (folder / f"{kind}list.txt").read_text(encoding="utf-8").splitlines()
        found |= {line.strip() for line in lines}
    return sorted(found - {""})


def draw_pair(source: random.Random) -> str:
    """Return an adjective and a noun, joined by a hyphen."""
    adjective, noun = (source.choice(load_words(kind)) for kind in ("adjective", "noun"))
    return f"{adjective}-{noun}"
