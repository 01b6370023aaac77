"""The page about a run in headless Chromium, from disk: light and dark, narrow and wide.

Screenshots are kept in tests/web/screenshots.
"""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from sparselong.report import write_page
from tests.report.made_run import MODELS, write_run
from tests.web.browsing import SHOTS

WIDTHS, SCHEMES = (360, 1400), ("light", "dark")


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    divergence = {
        model: {"kl": 0.02, "by_position": [{"first": 2**n, "last": 2 ** (n + 1) - 1, "kl": n / 99}
                                            for n in range(12)]}
        for model in MODELS[1:]
    }  # fmt: skip
    run_dir = write_run(tmp_path_factory.mktemp("run") / "gpt-oss-20b", divergence=divergence)
    return write_page(run_dir).resolve().as_uri()


@pytest.fixture(params=[(w, s) for w in WIDTHS for s in SCHEMES], ids=lambda p: f"{p[0]}-{p[1]}")
def shown(browser, address, request):
    """The page with its width and scheme, and what the browser asked for and complained about."""
    width, scheme = request.param
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
    )
    page = context.new_page()
    page.asked, page.told = [], []
    page.on("request", lambda asked: page.asked.append(asked.url))
    page.on("console", lambda message: page.told.append(message.text))
    page.on("pageerror", lambda error: page.told.append(str(error)))
    page.goto(address)
    yield page, width, scheme
    context.close()


def luminance(colour: str) -> float:
    """Return the relative luminance of `rgb(…)`, as WCAG defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def colour_of(page: Page, selector: str, key: str) -> str:
    return page.locator(selector).first.evaluate(f"e => getComputedStyle(e).{key}")


def test_the_page_loads_nothing_runs_nothing_and_fits(shown, address):
    page, width, scheme = shown
    expect(page.locator("h1")).to_have_text("gpt-oss-20b")
    assert page.title() == "gpt-oss-20b · Sparse-Long"  # the samples' script would change it
    SHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SHOTS / f"report-{width}-{scheme}.png", full_page=True)
    for details in page.locator("details").all():
        details.evaluate("e => e.open = true")
    sizes = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert sizes == [width, width], "the page itself must not scroll sideways"
    page.screenshot(path=SHOTS / f"report-{width}-{scheme}-open.png", full_page=True)
    assert set(page.asked) == {address} and page.told == []


def test_texts_can_be_read_in_both_schemes(shown):
    page, _, scheme = shown
    back = luminance(colour_of(page, "body", "backgroundColor"))
    assert (back > 0.5) is (scheme == "light")
    for selector in ("body", ".note", ".lead", "thead th", ".warning", "summary", ".legend"):
        behind = colour_of(page, selector, "backgroundColor")
        behind = luminance(behind) if selector == ".warning" else back
        text = luminance(colour_of(page, selector, "color"))
        contrast = (max(text, behind) + 0.05) / (min(text, behind) + 0.05)
        assert contrast >= 4.5, (selector, contrast)


def test_points_of_curves_say_their_values(shown):
    page, _, _ = shown
    found = page.evaluate(
        """() => [...document.querySelectorAll("#training .hover")].filter(
            point => point.textContent.startsWith("Validation perplexity")
        ).map(point => {
            point.scrollIntoView({block: "center"});
            const box = point.getBoundingClientRect();
            const hit = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
            return [point.textContent, hit && hit.textContent];
        })"""
    )
    assert len(found) == 2 and all(text == hit for text, hit in found), found


def test_tables_scroll_for_themselves_and_sections_open_by_keyboard(shown):
    page, width, _ = shown
    table = page.locator("#memory .scroll").first
    wide = table.evaluate("e => e.scrollWidth > e.clientWidth")
    assert wide is (width == 360)
    keys = page.locator("#asked dt", has_text="sequence_parallel_degree")
    expect(keys).not_to_be_visible()
    page.get_by_text("All keys", exact=True).focus()
    page.keyboard.press("Enter")
    expect(keys).to_be_visible()


def test_marks_of_axes_do_not_overlap(shown):
    page, _, _ = shown
    overlapping = page.evaluate(
        """() => [...document.querySelectorAll(".xs")].flatMap(axis => {
            const boxes = [...axis.children].map(mark => mark.getBoundingClientRect());
            return boxes.slice(1).filter((box, i) => box.width && box.left < boxes[i].right + 2);
        }).length"""
    )
    assert overlapping == 0
