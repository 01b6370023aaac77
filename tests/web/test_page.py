"""The page in headless Chromium: used as a person does, also by keyboard and on a narrow screen.

Screenshots are kept in tests/web/screenshots.
"""

from __future__ import annotations

import json
import re
import time

import pytest
from playwright.sync_api import Page, expect

from sparselong.data import Delta
from tests.chat.engines import HELLO, ScriptedEngine
from tests.web.browsing import SHOTS

LONG = [Delta("analysis", "The user wants numbers. ", None),
        *(Delta("final", f"{n}\n\n", None) for n in range(200))]  # fmt: skip
MARKDOWN = """# Title

A *weak* and **strong** word, `code`, [a link](https://example.com/x).

- one
- two
  1. deep

| a | b |
|---|---|
| 1 | <b>2</b> |

```html
<script>document.title = "run"</script>
```
> quoted
"""
EVIL = (
    '<img src=x onerror="document.title=1"> <script>document.title=2</script> '
    "[x](javascript:alert(1))"
)


@pytest.fixture
def context(browser):
    made = browser.new_context(viewport={"width": 1000, "height": 800}, accept_downloads=True)
    made.set_default_timeout(10_000)
    yield made
    made.close()


def visit(context, served) -> Page:
    page = context.new_page()
    page.failures = []
    page.on("pageerror", lambda error: page.failures.append(str(error)))
    page.on("console", lambda m: page.failures.append(m.text) if m.type == "error" else None)
    page.goto(served.address)
    expect(page.locator("h1")).to_have_text("run/finetuned")
    return page


def send(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send").click()


def answer(page: Page, number: int = -1):
    answers = page.locator("article.assistant")
    return answers.last if number < 0 else answers.nth(number)


def shoot(page: Page, name: str) -> None:
    SHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png")


def test_an_answer_streams_in_and_says_its_speed(context, server):
    engine = ScriptedEngine(LONG)
    engine.delay = 0.01
    page = visit(context, server.start(engine))
    send(page, "Count")
    expect(answer(page)).to_contain_text("3")
    assert "199" not in answer(page).inner_text()  # still coming
    expect(answer(page)).to_contain_text("199", timeout=30_000)
    expect(page.locator("#stats")).to_contain_text("tokens/s")
    expect(page.locator("#stats")).to_contain_text("first token after")
    expect(answer(page)).not_to_contain_text("wants numbers")
    assert page.failures == []


def test_stop_ends_the_answer_and_the_model(context, server):
    engine = ScriptedEngine(LONG)
    engine.delay = 0.05
    page = visit(context, server.start(engine))
    send(page, "Count")
    expect(answer(page)).to_contain_text("5")
    page.get_by_role("button", name="Stop").click()
    expect(answer(page)).to_contain_text("(stopped)")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    page.wait_for_timeout(300)
    said = len(engine.replies[0].said)
    page.wait_for_timeout(300)
    assert len(engine.replies[0].said) == said < 200
    send(page, "Go on")
    expect(page.locator("article.assistant")).to_have_count(2)
    expect(answer(page)).to_contain_text("3")
    page.keyboard.press("Escape")
    expect(answer(page)).to_contain_text("(stopped)")
    shoot(page, "stopped")


def test_retry_thinking_effort_and_sampling(context, server):
    engine = ScriptedEngine(HELLO)
    page = visit(context, server.start(engine))
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Reasoning effort").select_option("high")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Most new tokens").fill("55")
    page.get_by_label("System message").fill("Be brief.")
    send(page, "Hi")
    expect(answer(page)).to_contain_text("Hello there!")
    expect(answer(page)).not_to_contain_text("Let me think")
    page.get_by_label("Show thinking").check()
    expect(answer(page)).to_contain_text("Let me think")
    page.get_by_role("button", name="Retry").click()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(page.locator("article.assistant")).to_have_count(1)
    (first, used, _), (second, _, _) = engine.asked
    assert first == second == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
    ]  # fmt: skip
    assert (used.reasoning, used.temperature, used.max_new_tokens) == ("high", 0, 55)
    shoot(page, "settings")
    assert page.failures == []


def test_conversations_survive_a_reload_and_a_restart(context, server):
    served = server.start(ScriptedEngine(HELLO))
    page = visit(context, served)
    send(page, "Remember me, naïve 🙂")
    expect(answer(page)).to_contain_text("Hello there!")
    expect(page.locator("#names button")).to_have_count(1)
    page.reload()
    expect(page.locator("article.user")).to_have_text("Remember me, naïve 🙂")
    server.stop()
    port = int(served.address.rpartition(":")[2])
    server.start(ScriptedEngine(HELLO), port=port)
    page.goto(served.address)
    expect(page.locator("article.user")).to_have_text("Remember me, naïve 🙂")
    send(page, "More")
    expect(page.locator("article.assistant")).to_have_count(2)
    expect(page.locator("#stats")).to_contain_text("first token")
    (kept,) = served.folder.glob("*.json")
    deadline = time.monotonic() + 5
    while len(json.loads(kept.read_text(encoding="utf-8"))["messages"]) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    page.get_by_role("button", name="Conversations").click()
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete").click()
    expect(page.locator("#names button")).to_have_count(0)
    assert not list(served.folder.glob("*.json"))


def test_export_and_import(context, server, tmp_path):
    page = visit(context, server.start(ScriptedEngine(HELLO)))
    send(page, "Hi")
    expect(answer(page)).to_contain_text("Hello there!")
    page.get_by_role("button", name="Conversations").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    download.value.save_as(tmp_path / "talk.json")
    page.get_by_role("button", name="New").click()
    expect(page.locator("article")).to_have_count(0)
    page.locator("#file").set_input_files(tmp_path / "talk.json")
    expect(answer(page)).to_contain_text("Hello there!")
    (tmp_path / "junk.json").write_bytes(b"\x89PNG\x00\xff")
    (tmp_path / "other.json").write_text('{"format": "x"}')
    (tmp_path / "large.json").write_bytes(b" " * (50 << 20))
    for name in ("junk", "other", "large"):
        page.locator("#file").set_input_files(tmp_path / f"{name}.json")
        expect(page.get_by_role("alert")).to_contain_text(f"{name}.json was not imported")
        expect(answer(page)).to_contain_text("Hello there!")
    shoot(page, "refused_import")


def test_markdown_is_drawn_and_html_is_shown(context, server):
    page = visit(context, server.start(ScriptedEngine([Delta("final", MARKDOWN + EVIL, None)])))
    send(page, EVIL)
    expect(answer(page).locator("h2")).to_have_text("Title")
    expect(answer(page).locator("td").last).to_have_text("<b>2</b>")
    expect(answer(page).locator("pre")).to_contain_text("<script>document.title")
    expect(answer(page).locator("ol li")).to_have_text("deep")
    assert answer(page).locator("a").count() == 1
    assert page.locator("main img, main script").count() == 0
    expect(page.locator("article.user")).to_have_text(EVIL)
    assert page.title() == "run/finetuned" and page.failures == []
    shoot(page, "markdown")


def test_odd_texts_neither_stop_the_page_nor_slow_it(context, server):
    """Line ends of other systems, deep quotations, and what a model writes that repeats itself."""
    odd = ["- a\r\n- b\r\n", "- a\u2028b", ">" * 20_000, "a" + "[" * 100_000, "a" + "`" * 50_000]
    text = "\n\n".join(odd) + "\n\nthe end"
    served = server.start(ScriptedEngine([Delta("final", text, None)]))
    page = visit(context, served)
    begin = time.monotonic()
    send(page, "a" + "\U0001d400" * 60)  # of which a title takes whole characters
    expect(answer(page)).to_contain_text("the end")
    assert answer(page).locator("li").count() == 3
    expect(page.get_by_label("Message", exact=True)).to_be_enabled()
    while not list(served.folder.glob("*.json")):
        assert time.monotonic() < begin + 5
        time.sleep(0.05)
    assert time.monotonic() < begin + 5 and page.failures == []


def test_everything_can_be_done_by_keyboard(context, server):
    engine = ScriptedEngine(HELLO)
    page = visit(context, server.start(engine))
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(answer(page)).to_contain_text("Hello there!")
    expect(page.locator("article.user")).to_have_text(re.compile("one\ntwo"))
    reached = set()
    for _ in range(24):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert {"question", "send", "retry", "toggle-list", "toggle-settings"} <= reached


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1400])
def test_screens_of_all_widths_and_both_colours(browser, server, scheme, width):
    made = browser.new_context(viewport={"width": width, "height": 740}, color_scheme=scheme)
    page = visit(made, server.start(ScriptedEngine([*HELLO[:1], Delta("final", MARKDOWN, None)])))
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Show thinking").check()
    send(page, "A long word: " + "x" * 300)
    expect(answer(page)).to_contain_text("quoted")
    shoot(page, f"{scheme}_{width}_settings")
    page.get_by_role("button", name="Settings").click()
    shoot(page, f"{scheme}_{width}")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(22, 24, 28)")
    made.close()


def test_a_refusal_is_told_and_the_question_stays(context, server):
    from sparselong.chat.engine import PromptTooLong

    engine = ScriptedEngine(HELLO)
    page = visit(context, server.start(engine))
    engine.refusal = PromptTooLong(5000, 1000)
    send(page, "Too long")
    expect(page.get_by_role("alert")).to_contain_text("too long")
    expect(page.get_by_label("Message", exact=True)).to_have_value("Too long")
    expect(page.locator("article")).to_have_count(0)


def test_a_password_is_asked_for_once(context, server):
    served = server.start(ScriptedEngine(HELLO), token="secret")
    page = context.new_page()
    page.on("dialog", lambda dialog: dialog.accept("secret"))
    page.goto(served.address)
    expect(page.locator("h1")).to_have_text("run/finetuned")
    send(page, "Hi")
    expect(answer(page)).to_contain_text("Hello there!")
