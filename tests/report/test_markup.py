"""Text never becomes markup, whatever it holds."""

import pytest

from sparselong.report.elements.markup import element, join, stylesheet
from tests.report.made_run import EVIL
from tests.report.reading import Page


def test_texts_and_attributes_are_escaped():
    made = element("p", EVIL, title=f'"{EVIL}', class_="x", aria_label=None, hidden=True)
    page = Page(made)
    assert page.tags == {"p"} and page.words == [EVIL]
    assert page.elements[0][1] == {"title": f'"{EVIL}', "class": "x", "hidden": None}


def test_markup_is_kept_and_other_children_are_texts():
    made = join(["<", element("b", 1), None, [2.5, (element("br"), "&")], (c for c in "ab")])
    assert made == "&lt;<b>1</b>2.5<br>&amp;ab"


def test_what_no_page_can_hold_is_shown_as_such():
    text = element("p", "a\x00\x1b[31m\ud800b\n\tc\N{GRINNING FACE}")
    assert text == "<p>a\ufffd\ufffd[31m\ufffdb\n\tc\N{GRINNING FACE}</p>"
    assert text.encode("utf-8")


def test_a_style_sheet_cannot_end_its_element():
    assert stylesheet("a > b { }") == "<style>a > b { }</style>"
    with pytest.raises(ValueError, match="ends its own element"):
        stylesheet("</style><script>")
