"""Variable tracking: find all variables that have a value, through a chain of assignments.

`VAR A = 12345`, `VAR B = VAR A`, … stand in this order at random places among sentences without
meaning. A solved example with shorter names comes first.
"""

from __future__ import annotations

import random
import string

from sparselong.data.ruler.draft import NOISE, Draft

HOPS = 4
"""Assignments of one variable to another."""
_LETTERS, _EXAMPLE_LETTERS = 5, 3
_EXAMPLE_LINES = 10
_TEXT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{text}\nQuestion: Find all variables that are assigned the value {value} in the text above."
)
_ANSWER = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} "
    "variables are assigned the value {value}, they are:"
)


def draw(source: random.Random, size: int, _: int) -> Draft:
    """Return a chain of variables among `size` lines of sentences without meaning."""
    example = _draw_chain(source, _EXAMPLE_LINES, _EXAMPLE_LETTERS)
    question = _draw_chain(source, size, _LETTERS)
    solved = f"{example.prompt} {' '.join(example.answers)}"
    return Draft(f"{solved}\n\n{question.prompt}", question.answers)


def _draw_chain(source: random.Random, size: int, letters: int) -> Draft:
    names: list[str] = []
    while len(names) < HOPS + 1:
        name = "".join(source.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    value = str(source.randrange(10_000, 100_000))
    assigned = [value, *(f"VAR {name}" for name in names[:-1])]
    lines = [NOISE] * size
    places = sorted(source.sample(range(size), len(names)))
    for shift, (place, name, what) in enumerate(zip(places, names, assigned, strict=True)):
        lines.insert(place + shift, f"VAR {name} = {what}")
    text = _TEXT.format(text="\n".join(lines), value=value)
    return Draft(text + _ANSWER.format(count=len(names), value=value), names)
