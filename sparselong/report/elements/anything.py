"""Any JSON as readable HTML: what a stage has written and this page knows nothing about.

Objects of plain values become lists of names and values, objects or lists of such objects become
tables, and everything else is shown level by level, down to a depth at which the JSON itself is
shown. Lists and texts are cut at a length, and the page says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sparselong.report.elements.figures import MISSING, show
from sparselong.report.elements.markup import Child, Markup, element
from sparselong.report.elements.tables import pairs, table

_MOST_COLUMNS, _MOST_ROWS, _MOST_VALUES, _DEEPEST = 12, 60, 24, 3
_MOST_CHARACTERS = 2000


def show_anything(value: Any, name: str = "", depth: int = 0) -> list[Markup]:
    """Return any JSON value as blocks of HTML.

    Args:
        value: of JSON; what a list holds is numbered from 0, as layers are elsewhere on the page.
        name: its key, which may tell a unit.
        depth: number of levels above it.
    """
    if _is_plain(value):
        return [element("p", _plain(value, name))]
    if depth >= _DEEPEST:
        return [element("pre", _cut(json.dumps(value, ensure_ascii=False)))]
    if isinstance(value, Mapping):
        return _show_object(value, depth)
    if value and all(_is_row(each) for each in value):
        named = [(str(number), row) for number, row in enumerate(value)]
        return _show_rows(named, "", depth)
    numbered = {str(number): each for number, each in enumerate(value[:_MOST_VALUES])}
    return [*_show_object(numbered, depth), *_left_out(len(value) - _MOST_VALUES)]


def _show_object(value: Mapping[str, Any], depth: int) -> list[Markup]:
    """Return an object: its plain values, then each other one below its name."""
    plain = {key: _plain(each, key) for key, each in value.items() if _is_plain(each)}
    rest = {key: each for key, each in value.items() if not _is_plain(each)}
    blocks = [pairs(plain)] if plain else []
    rows = [(key, _as_row(each)) for key, each in rest.items()]
    if rows and all(row is not None for _, row in rows):
        return blocks + _show_rows(rows, "", depth)
    for key, each in rest.items():
        blocks += [element("h4", key.replace("_", " ")), *show_anything(each, key, depth + 1)]
    return blocks


def _show_rows(rows: Sequence[tuple[str, Any]], title: str, depth: int) -> list[Markup]:
    """Return named objects of plain values as a table."""
    columns = list(dict.fromkeys(key for _, row in rows for key in row))
    if len(columns) > _MOST_COLUMNS:
        return [
            block
            for name, row in rows[:_MOST_ROWS]
            for block in (element("h4", name), *_show_object(row, depth + 1))
        ] + _left_out(len(rows) - _MOST_ROWS)
    texts = 1
    for column in columns:
        if not any(isinstance(row.get(column), str) for _, row in rows):
            break
        texts += 1
    body = [
        [name, *(_plain(row[column], column) if column in row else MISSING for column in columns)]
        for name, row in rows[:_MOST_ROWS]
    ]
    head = [title, *(column.replace("_", " ") for column in columns)]
    return [table(head, body, texts=texts), *_left_out(len(rows) - _MOST_ROWS)]


def _is_plain(value: Any) -> bool:
    """Return whether a value is shown on one line: a scalar, or a list of scalars."""
    if isinstance(value, list):
        return all(not isinstance(each, list | Mapping) for each in value)
    return not isinstance(value, Mapping) or not value


def _is_row(value: Any) -> bool:
    return isinstance(value, Mapping) and all(_is_plain(each) for each in value.values())


def _as_row(value: Any) -> dict[str, Any] | None:
    """Return an object whose values are plain, or objects of plain values, as one row."""
    if not isinstance(value, Mapping):
        return None
    row = {}
    for key, each in value.items():
        if _is_plain(each):
            row[key] = each
        elif _is_row(each):
            row |= {f"{key}_{inner}": deep for inner, deep in each.items()}
        else:
            return None
    return row


def _plain(value: Any, name: str) -> Child:
    """Return a plain value as text; long ones are cut, and lines are kept."""
    if isinstance(value, list):
        more = len(value) - _MOST_VALUES
        text = show(value[:_MOST_VALUES], name)
        return f"{text} and {more:,} more" if more > 0 else text
    if isinstance(value, str) and ("\n" in value or len(value) > 80):
        return element("div", _cut(value), class_="said", dir="auto")
    return show(value, name)


def _cut(text: str) -> str:
    more = len(text) - _MOST_CHARACTERS
    return f"{text[:_MOST_CHARACTERS]} … ({more:,} more characters)" if more > 0 else text


def _left_out(count: int) -> list[Markup]:
    return [element("p", f"and {count:,} more", class_="aside")] if count > 0 else []
