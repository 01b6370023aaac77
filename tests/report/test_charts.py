"""Charts show the figures that they are given, at their places on round axes."""

import math
import re

import pytest

from sparselong.report.elements.axes import linear_axis, log2_axis, step_axis
from sparselong.report.elements.charts import (
    Interval,
    Series,
    chart,
    intervals,
    stacked_bars,
    thin_out,
)
from sparselong.report.elements.figures import show, show_bytes, show_change, show_number
from tests.report.reading import Page

LINEAR = {
    "ordinary": ([2.84, 4.37], ["2.5", "3.0", "3.5", "4.0", "4.5"]),
    "one value": ([3.0], ["2.6", "2.8", "3.0", "3.2", "3.4"]),
    "nothing": ([], ["0", "0.25", "0.50", "0.75", "1.00"]),
    "zeros": ([0.0, 0.0], ["−1.0", "−0.5", "0", "0.5", "1.0"]),
    "negative": ([-30.0, 10.0], ["−30", "−20", "−10", "0", "10"]),
    "large": ([12_000.0, 48_000.0], ["10,000", "20,000", "30,000", "40,000", "50,000"]),
    "tiny": ([1e-4, 3e-4], ["0.00010", "0.00015", "0.00020", "0.00025", "0.00030"]),
}


@pytest.mark.parametrize(("values", "marks"), LINEAR.values(), ids=LINEAR)
def test_a_linear_axis_has_round_marks_around_its_values(values, marks):
    axis = linear_axis(values)
    assert [text for _, text in axis.marks] == marks
    assert axis.low <= min(values, default=0) and max(values, default=1) <= axis.high
    assert axis.place(axis.low) == 0 and axis.place(axis.high) == 100


@pytest.mark.parametrize("low", [1, 7, 64, 96, 4096])
@pytest.mark.parametrize("ratio", [1, 1.5, 2.7, 16, 1000])
def test_a_logarithmic_axis_has_marks_to_read_it_by(low, ratio):
    axis = log2_axis([low, low * ratio])
    places = [axis.place(mark) for mark, _ in axis.marks]
    assert 1 <= len(places) <= 6 and places == sorted(set(places))
    assert all(0 <= place <= 100 for place in places)
    assert [float(text.replace(",", "")) for _, text in axis.marks] == [m for m, _ in axis.marks]
    if low > 1 or ratio > 2:  # between 1 and 1.5 there is one whole number
        assert len(places) >= 2


def test_an_axis_of_steps_ends_with_the_last_step():
    axis = step_axis([0, 61])
    assert [text for _, text in axis.marks] == ["0", "20", "40", "60"] and axis.place(61) == 100
    assert [text for _, text in step_axis([0, 3]).marks] == ["0", "1", "2", "3"]
    assert [text for _, text in step_axis([7]).marks] == ["6", "7", "8"]


def test_points_are_at_their_places_and_say_their_values():
    x, y = step_axis([0, 10]), linear_axis([0.0, 4.0])
    points = [(0, 1.0), (5, math.nan), (10, 3.0), (7, math.inf)]
    made = Page(chart([Series("loss", points)], (x, y), ("step", "nats"), "Loss"))
    paths = {found["class"]: found["d"] for tag, found in made.elements if tag == "path"}
    assert paths["curve first"] == "M0.0 75.0L100.0 25.0"
    assert {"loss: 1.000 at step 0", "loss: 3.000 at step 10"} <= set(made.words)
    assert "nats" in made.text and "Loss" in made.text


def test_columns_begin_at_zero():
    axes = step_axis([0, 10]), linear_axis([0.0, 4.0], from_zero=True)
    made = chart([Series("flips", [(5, 2.0)], is_columns=True)], axes, ("step", "%"), "Flips")
    assert 'd="M50.0 100.0V50.0"' in made and 'class="column first"' in made


def test_several_series_have_a_legend():
    axes = step_axis([0, 1]), linear_axis([0.0, 1.0])
    both = [Series("one", [(0, 0), (1, 1)]), Series("two", [(0, 1), (1, 0)], "second")]
    assert Page(chart(both, axes, ("x", "y"), "t")).count("span", "key") == 2
    assert Page(chart(both[:1], axes, ("x", "y"), "t")).count("span", "key") == 0


def test_long_curves_keep_their_extremes():
    points = [(step, 2.0) for step in range(10_000)]
    points[5_000], points[7_777] = (5_000, 9.0), (7_777, -1.0)
    drawn = thin_out(points)
    assert len(drawn) <= 300 and {(5_000, 9.0), (7_777, -1.0)} <= set(drawn)
    assert drawn == sorted(drawn) and drawn[0] == points[0]
    assert thin_out(points[:300]) == points[:300]


def test_intervals_reach_one_standard_error_to_both_sides():
    rows = [Interval("base", 50.0, 10.0, "50.0 % ± 10.0 %")]
    made = intervals(rows, linear_axis([0.0, 100.0]), "acc", line=25.0, line_text="chance")
    assert 'd="M40.0 50H60.0"' in made and 'd="M50.0 50h0"' in made and 'd="M25.0 0V100"' in made


def test_stacked_bars_are_to_one_scale():
    rows = [("planned", {"a": 30, "b": 10, "c": 0}, "40"), ("measured", {"all": 20}, "20")]
    made = stacked_bars(rows, {"a": "part0", "b": "part1", "all": "measured"}, "Memory")
    assert re.findall(r"width:([\d.]+)%", made) == ["75.00", "25.00", "50.00"]
    assert "a: 75.0 % of planned" in made


FIGURES = {
    "whole": (1234567, "count", "1,234,567"),
    "digits": (31.732286, "perplexity", "31.73"),
    "large": (98765.43, "loss", "98,765"),
    "small": (0.00012345, "kl", "1.23e−04"),
    "negative": (-0.5, "difference", "−0.5000"),
    "zero": (0.0, "loss", "0.000"),
    "not a number": (math.nan, "loss", "–"),
    "infinite": (math.inf, "perplexity", "∞"),
    "nothing": (None, "limit", "–"),
    "truth": (True, "ready", "yes"),
    "bytes": (13 * 2**30, "peak_bytes", "13.00 GiB"),
    "seconds": (150.0, "load_seconds", "2 min"),
    "list": ([1, 2], "steps", "1, 2"),
    "no list": ([], "targets", "none"),
    "object": ({"host": 2**30}, "peak_bytes", "host 1.00 GiB"),
}


@pytest.mark.parametrize(("value", "name", "text"), FIGURES.values(), ids=FIGURES)
def test_figures_are_for_people(value, name, text):
    assert show(value, name) == text


def test_bytes_that_are_compared_have_one_unit():
    assert [show_bytes(n * 2**20) for n in (1006, 2048, 103)] == [
        "0.98 GiB",
        "2.00 GiB",
        "0.10 GiB",
    ]
    assert show_bytes(78 * 1024) == "78.00 KiB" and show_bytes(12) == "12 B"
    assert show_bytes(None) == "–"


def test_differences_have_a_sign():
    assert show_change(0.5) == "+0.50" and show_change(-0.5, 0.25) == "−0.50 ± 0.25"
    assert show_change(0.1, math.nan) == "+0.10 ± –" and show_change(math.inf) == "∞"
    assert show_number(-3) == "−3"
