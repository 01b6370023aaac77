"""Multiple-choice items in hellaswag's form, from held-out prose.

An item shows the beginning of a paragraph and four endings of about the same length: the true one,
and endings of other documents of the same kind and language, cut from their paragraphs in the same
way. Text is plain: single spaces and no brackets, which hellaswag's preprocessing would remove.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

from benchmarks.proxy.text import Document, list_paragraphs
from sparselong.data.corpus import is_prose

ENDINGS = 4
_CONTEXT_WORDS = (14, 40)
_ENDING_WORDS = (10, 16)
_KINDS = ("manual", "docs", "reference")
_MOST_OF_A_DOCUMENT = 40
_LEAST_LETTERS = 0.9
"""Share of letters, spaces and punctuation in prose; tables and code have less."""
_COMPARED = 60
"""Endings of which those with the nearest length are taken."""


class _Cut(NamedTuple):
    document: int
    context: str
    ending: str


def make_items(documents: Iterable[Document], count: int, seed: int) -> list[dict[str, Any]]:
    """Return items with the fields of hellaswag's rows.

    Args:
        documents: those of the training text are not used.
        count: most items.
        seed: decides contexts, endings and labels.

    Raises:
        ValueError: a quarter of the items cannot be made.
    """
    source = random.Random(f"{seed}/hellaswag")
    groups: dict[tuple[str, str], list[_Cut]] = defaultdict(list)
    for number, document in enumerate(documents):
        if document.held_out and document.kind in _KINDS:
            groups[document.kind, document.language] += _cut(number, document, source)
    items = []
    for (kind, language), cuts in sorted(groups.items()):
        for cut in cuts:
            wrong = _choose_others(cut, cuts, source)
            if len(wrong) == ENDINGS - 1:
                items.append(_item(cut, wrong, f"{kind} {language}", source))
    source.shuffle(items)
    if len(items) < count // 4:
        raise ValueError(f"{len(items)} items from held-out text; wanted: {count}")
    return [{"ind": number, **item} for number, item in enumerate(items[:count])]


def _cut(number: int, document: Document, source: random.Random) -> list[_Cut]:
    """Return some of a document's paragraphs, each cut into a context and its ending."""
    cuts = []
    for paragraph in list_paragraphs(document.text):
        words = paragraph.split(" ")
        before, after = source.randint(*_CONTEXT_WORDS), source.randint(*_ENDING_WORDS)
        if len(words) >= before + after and _is_plain(" ".join(words[: before + after])):
            context, ending = words[:before], words[before : before + after]
            cuts.append(_Cut(number, " ".join(context), " ".join(ending)))
    return source.sample(cuts, min(len(cuts), _MOST_OF_A_DOCUMENT))


def _is_plain(text: str) -> bool:
    """Return whether a text is prose without code, tables and brackets."""
    letters = sum(each.isalpha() or each in " .,;:'-" for each in text)
    return is_prose(text) and letters >= _LEAST_LETTERS * len(text) and not set("[]<>{}|") & {*text}


def _choose_others(cut: _Cut, cuts: list[_Cut], source: random.Random) -> list[str]:
    """Return endings of three other documents whose length is nearest to the true one's."""
    drawn = source.sample(cuts, min(len(cuts), _COMPARED))
    drawn.sort(key=lambda other: abs(len(other.ending) - len(cut.ending)))
    chosen: dict[int, str] = {}
    for other in drawn:
        if other.document != cut.document and other.ending not in (cut.ending, *chosen.values()):
            chosen.setdefault(other.document, other.ending)
    return list(chosen.values())[: ENDINGS - 1]


def _item(cut: _Cut, wrong: list[str], label: str, source: random.Random) -> dict[str, Any]:
    place = source.randrange(ENDINGS)
    return {
        "activity_label": label,
        "ctx_a": cut.context,
        "ctx_b": "",
        "ctx": cut.context,
        "endings": [*wrong[:place], cut.ending, *wrong[place:]],
        "label": place,
        "source_id": f"proxy~{cut.document}",
        "split": "val",
        "split_type": "zeroshot",
    }
