"""JSON that the page knows nothing about is shown, cut where it is long, and never as markup."""

import pytest

from sparselong.report.elements.anything import show_anything
from sparselong.report.elements.markup import join
from tests.report.made_run import EVIL
from tests.report.reading import Page

CASES = {
    "plain": ({"missing_end": 3, "mean": 0.25, "until": None}, ["missing_end 3", "mean 0.2500"]),
    "a table": (
        {"base": {"score": 0.5, "n": 4}, "finetuned": {"score": 0.75}},
        ["score n base 0.5000 4 finetuned 0.7500 –"],
    ),
    "rows of objects": (
        {"base": None, "compressed": {"all": {"kl": 0.5, "agreement": 0.75}, "conversations": 4}},
        ["base –", "all kl all agreement conversations compressed 0.5000 0.7500 4"],
    ),
    "a list of rows": (
        [{"length": 4096, "acc": 0.5}, {"length": 8192, "acc": 0.25}],
        ["0 4,096", "1 8,192"],
    ),
    "levels": ({"low": {"base": {"loops": {"count": 2}}}}, ["low loops count base 2"]),
    "deeper": ({"a": {"b": {"c": {"d": {"e": [{"f": 1}, 2]}}}}}, ['{"e": [{"f": 1}, 2]}']),
    "mixed": ({"a": [1, {"b": 2}], "c": []}, ["c none a 0 1 b 1 2"]),
    "a scalar": (0.125, ["0.1250"]),
    "texts": ({"answer": "one\ntwo"}, ["one two"]),
    "units": ({"base": {"load_seconds": 150.0, "bytes": 2**31}}, ["2 min", "2.00 GiB"]),
    "many columns": ({"base": {f"column{n}": n for n in range(20)}}, ["base", "column19 19"]),
    "markup": ({EVIL: {EVIL: EVIL}, "b": [EVIL]}, [EVIL]),
}


@pytest.mark.parametrize(("value", "texts"), CASES.values(), ids=CASES)
def test_any_structure_is_shown(value, texts):
    page = Page(join(show_anything(value)))
    for text in texts:
        assert text in page.text
    assert not page.tags & {"script", "img"}


def test_long_lists_and_texts_are_cut_and_the_page_says_so():
    rows = [{"item": n, "right": 1} for n in range(100)]
    mixed = [[n, {}] for n in range(30)]
    found = {"rows": rows, "numbers": list(range(5000)), "text": "a" * 3000, "mixed": mixed}
    text = Page(join(show_anything(found))).text
    assert "and 40 more" in text and "and 4,976 more" in text and "(1,000 more characters)" in text
    assert "and 6 more" in text and len(text) < 6000
