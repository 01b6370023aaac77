"""Tables that scroll on a narrow screen, lists of named values, and what can be folded away."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from sparselong.report.elements.markup import Child, Markup, element

_LONG = 36
"""Characters of a text that is not broken into lines."""


def table(
    head: Sequence[Child], rows: Iterable[Sequence[Child]], *, texts: int = 1, caption: Child = None
) -> Markup:
    """Return a table that scrolls for itself if it is wider than the screen.

    Args:
        head: names of the columns.
        rows: cells of each row; the first names the row.
        texts: number of columns on the left that hold text; the others hold numbers.
        caption: what the table shows.
    """
    kinds = ["text" if column < texts else None for column in range(len(head))]
    titles = [
        element("th", cell, scope="col", class_=k) for cell, k in zip(head, kinds, strict=True)
    ]
    body = []
    for first, *others in rows:
        cells = [_cell(cell, kind) for cell, kind in zip(others, kinds[1:], strict=True)]
        body.append(element("tr", element("th", first, scope="row", class_="text"), cells))
    whole = element(
        "table",
        element("caption", caption) if caption is not None else None,
        element("thead", element("tr", titles)),
        element("tbody", body),
    )
    return element("div", whole, class_="scroll", tabindex=0)


def _cell(cell: Child, kind: str | None) -> Markup:
    """Return a cell; only text that is long may take several lines."""
    is_long = isinstance(cell, str) and kind is not None and len(cell) > _LONG
    return element("td", cell, class_=f"{kind} long" if is_long else kind)


def pairs(values: Mapping[str, Child]) -> Markup:
    """Return names with their values, one below the other."""
    rows = [[element("dt", name), element("dd", value)] for name, value in values.items()]
    return element("dl", *(element("div", row) for row in rows), class_="pairs")


def folded(summary: Child, *content: Child) -> Markup:
    """Return content that is shown when its summary is clicked."""
    return element("details", element("summary", summary), content)


def beside(*blocks: Child) -> Markup:
    """Return blocks next to each other where the screen is wide enough."""
    return element("div", *(element("div", block) for block in blocks), class_="beside")


def note(*content: Child, kind: str = "note") -> Markup:
    """Return a remark: `note` or `warning`."""
    return element("p", content, class_=kind)
