"""The page's paths, and the files behind them; tests/web looks at the page itself."""

import asyncio
import json

import httpx
import pytest

from sparselong.chat.conversation import Conversation
from sparselong.chat.server import add_page, make_app
from sparselong.chat.settings import Settings
from tests.chat.engines import ScriptedEngine

TALK = Conversation(
    [{"role": "user", "content": "<b>Hi</b>\u2028"}], "m", {"top_p": 0.5}
).document()


def ask(folder, *requests):
    """Return the responses to requests, each a method, a path and perhaps a document."""

    async def run():
        engine, settings = ScriptedEngine(), Settings()
        app = make_app(engine, settings, most_waiting=4)
        add_page(app, engine, settings, folder)
        transport = httpx.ASGITransport(app)
        try:
            async with httpx.AsyncClient(
                transport=transport, base_url="http://127.0.0.1"
            ) as client:
                return [
                    await client.request(method, path, json=body[0] if body else None)
                    for method, path, *body in requests
                ]
        finally:
            app.state.turns.close()

    return asyncio.run(run())


def test_a_conversation_is_kept_until_it_is_deleted(tmp_path):
    kept, read, names, gone, missing = ask(
        tmp_path / "new",
        ("PUT", "/conversations/My talk", TALK),
        ("GET", "/conversations/My talk"),
        ("GET", "/conversations"),
        ("DELETE", "/conversations/My talk"),
        ("GET", "/conversations/My talk"),
    )
    assert (kept.status_code, gone.status_code, missing.status_code) == (204, 204, 404)
    assert read.json() == TALK and names.json() == ["My talk"]
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("%2e%2e", TALK),
        ("\U0001d400" * 60, TALK),
        ("talk", {**TALK, "messages": [{"role": "assistant", "tool_calls": [1]}]}),
        ("talk", {**TALK, "settings": {"temperature": "hot"}}),
    ],
)
def test_what_is_no_conversation_is_refused(tmp_path, name, body):
    (response,) = ask(tmp_path, ("PUT", f"/conversations/{name}", body))
    assert response.status_code == 400 and "cannot be used" in response.json()["error"]["message"]
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_kept_is_told(tmp_path):
    """As on a full disk; here a file lies in the folder's place, then a folder in a file's."""
    (tmp_path / "file").touch()
    (response,) = ask(tmp_path / "file", ("PUT", "/conversations/talk", TALK))
    assert response.status_code == 500 and response.json()["error"]["code"] == "not_kept"
    (tmp_path / "talk.json").mkdir()
    for method, *body in (("PUT", TALK), ("DELETE",)):
        (response,) = ask(tmp_path, (method, "/conversations/talk", *body))
        assert response.status_code == 500 and "talk.json" in response.json()["error"]["message"]


def test_a_damaged_file_is_told(tmp_path):
    (tmp_path / "talk.json").write_text(json.dumps(TALK)[:-3])
    (response,) = ask(tmp_path, ("GET", "/conversations/talk"))
    assert response.status_code == 409 and response.json()["error"]["code"] == "damaged"
