"""Charts as inline SVG: curves, columns, intervals and stacked bars, with values on hovering.

A chart fills the width it is given. Its lines are stretched with it, but neither their widths nor
any text are: the SVG has no text, and marks and labels are HTML at percentages of the axes. Points
are lines of no length with round ends, which stay round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparselong.report.elements.axes import Axis
from sparselong.report.elements.figures import show_number, show_percent
from sparselong.report.elements.markup import Child, Markup, element

_MOST_POINTS = 300
"""Points of a curve that are drawn; longer ones are thinned out."""


@dataclass(frozen=True)
class Series:
    """Points of a curve or of columns.

    Attributes:
        name: for the legend and on hovering.
        points: x and y; those that are not finite are left out.
        colour: class of the style sheet that gives its colour.
        is_columns: whether the points are columns from zero instead of a curve.
        has_dots: whether points are marked.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: str = "first"
    is_columns: bool = False
    has_dots: bool = False

    @property
    def finite(self) -> list[tuple[float, float]]:
        """The points that can be drawn."""
        return [(x, y) for x, y in self.points if math.isfinite(x) and math.isfinite(y)]


def chart(
    series: Sequence[Series],
    axes: tuple[Axis, Axis],
    labels: tuple[str, str],
    title: str,
    *,
    lines: Sequence[tuple[float, str]] = (),
    is_low: bool = False,
) -> Markup:
    """Return a chart of curves or columns over one x axis.

    Args:
        series: what is drawn.
        axes: x and y.
        labels: names of x and y with their units.
        title: what the chart shows.
        lines: vertical lines at x, with what is said on hovering.
        is_low: whether it is less tall than others.
    """
    x, y = axes
    drawn = [_line(y=y.place(mark), class_="grid") for mark, _ in y.marks]
    drawn += [_line(x=x.place(at), title=text, class_="rule") for at, text in lines]
    for each in series:
        drawn += _draw(each, x, y, labels)
    svg = _svg(drawn, title)
    ys = [element("span", text, style=f"bottom:{y.place(at)}%") for at, text in y.marks]
    xs = [element("span", text, style=f"left:{x.place(at)}%") for at, text in x.marks]
    gutter = max(len(text) for _, text in y.marks) + 0.5
    plot = element(
        "div",
        element("div", ys, class_="ys"),
        element("div", svg, class_="area"),
        element("div", xs, class_="xs"),
        class_="plot low" if is_low else "plot",
        style=f"--gutter:{gutter}ch",
    )
    name = element("div", element("b", labels[1]), legend(series), class_="legend")
    below = element("div", labels[0], class_="x-label")
    return element("figure", element("figcaption", title), name, plot, below)


def legend(series: Sequence[Series]) -> Markup | None:
    """Return the names of several series with their colours; None for one alone."""
    if len(series) < 2:
        return None
    keys = [element("span", element("i", class_=s.colour), s.name, class_="key") for s in series]
    return element("span", keys)


def thin_out(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the lowest and highest of neighbouring points if there are too many to be drawn."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    size = math.ceil(2 * len(points) / _MOST_POINTS)
    kept = []
    for begin in range(0, len(points), size):
        part = sorted(points[begin : begin + size], key=lambda point: point[1])
        kept += sorted({part[0], part[-1]})
    return kept


def _draw(series: Series, x: Axis, y: Axis, labels: tuple[str, str]) -> list[Markup]:
    """Return a series as SVG: its curve or columns, and a place to hover at each point."""
    points = thin_out(series.finite)
    places = [(x.place(a), 100 - y.place(b)) for a, b in points]
    drawn = []
    if series.is_columns:
        zero = 100 - y.place(0.0)
        drawn += [_path(f"M{a} {zero}V{b}", f"column {series.colour}") for a, b in places]
    elif len(places) > 1:
        path = "M" + "L".join(f"{a} {b}" for a, b in places)
        drawn.append(_path(path, f"curve {series.colour}"))
    if series.has_dots or len(places) == 1 and not series.is_columns:
        drawn += [_path(f"M{a} {b}h0", f"dot {series.colour}") for a, b in places]
    for (a, b), (left, top) in zip(points, places, strict=True):
        text = f"{series.name}: {show_number(b)} at {labels[0]} {show_number(_whole(a))}"
        drawn.append(_path(f"M{left} {top}h0", "hover", text))
    return drawn


def _whole(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _svg(children: Sequence[Child], title: str, class_: str | None = None) -> Markup:
    return element(
        "svg",
        children,
        viewBox="0 0 100 100",
        preserveAspectRatio="none",
        role="img",
        aria_label=title,
        class_=class_,
    )


def _path(path: str, class_: str, title: str | None = None) -> Markup:
    return element("path", element("title", title) if title else None, d=path, class_=class_)


def _line(
    *, x: float | None = None, y: float | None = None, title: str | None = None, class_: str
) -> Markup:
    """Return a line across the chart: vertical at x, or horizontal at y, in percent."""
    path = f"M{x} 0V100" if x is not None else f"M0 {100 - (y or 0.0)}H100"
    return _path(path, class_, title)


@dataclass(frozen=True)
class Interval:
    """A row of a chart of intervals: a value with its standard error."""

    name: str
    value: float
    stderr: float
    text: str
    colour: str = "first"


def intervals(
    rows: Sequence[Interval],
    axis: Axis,
    title: str,
    *,
    line: float | None = None,
    line_text: str = "",
) -> Markup:
    """Return values with their standard errors, one below the other on one axis.

    Args:
        rows: the values.
        axis: on which all of them and the line are.
        title: what the chart shows.
        line: a value to compare with, drawn across the rows.
        line_text: what that value is.
    """
    drawn = []
    for row in rows:
        low, high = (axis.place(row.value + sign * row.stderr) for sign in (-1, 1))
        marks = [_path(f"M{axis.place(mark)} 0V100", "grid") for mark, _ in axis.marks]
        if line is not None:
            marks.append(_path(f"M{axis.place(line)} 0V100", "rule chance", line_text))
        marks += [
            _path(f"M{low} 50H{high}", f"whisker {row.colour}"),
            _path(f"M{axis.place(row.value)} 50h0", f"dot large {row.colour}"),
            _path(f"M{low} 50H{high}", "hover", f"{row.name}: {row.text}"),
        ]
        track = element("div", _svg(marks, f"{row.name}: {row.text}"), class_="track")
        drawn.append(_bar_row(row.name, row.text, track))
    xs = [element("span", text, style=f"left:{axis.place(at)}%") for at, text in axis.marks]
    body = element("div", drawn, element("div", xs, class_="xs"), class_="bars")
    return element("figure", element("figcaption", title), body)


def stacked_bars(
    rows: Sequence[tuple[str, Mapping[str, float], str]], colours: Mapping[str, str], title: str
) -> Markup:
    """Return rows of parts beside each other, all to the scale of the longest row.

    Args:
        rows: name, sizes by part, and text of each row.
        colours: class of the style sheet by part.
        title: what the chart shows.
    """
    longest = max((sum(parts.values()) for _, parts, _ in rows), default=0) or 1
    drawn = []
    for name, parts, text in rows:
        whole = sum(parts.values()) or 1
        pieces = [
            element(
                "i",
                class_=colours[part],
                title=f"{part}: {show_percent(size / whole)} of {name}",
                style=f"width:{100 * size / longest:.2f}%",
            )
            for part, size in parts.items()
            if size
        ]
        drawn.append(_bar_row(name, text, element("div", pieces, class_="stack")))
    body = element("div", drawn, class_="bars")
    return element("figure", element("figcaption", title), body)


def _bar_row(name: str, text: str, bar: Markup) -> Markup:
    """Return a row of bars; on a narrow screen the bar is below its name and text."""
    value = element("span", text, class_="value")
    return element("div", element("span", name), value, bar, class_="bar-row")
