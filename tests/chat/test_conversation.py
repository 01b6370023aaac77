"""Conversation files: what is kept comes back, everything else is refused."""

import json

import pytest

from sparselong.chat import conversation as files
from sparselong.chat.conversation import Conversation
from sparselong.errors import StageError

CALLS = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<b>hi</b> naïve 🙂\u2028"},
    {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": CALLS},
    {"role": "tool", "content": "42", "tool_call_id": "x"},
]


def document(**changed):
    return {**Conversation(MESSAGES, "m", {"top_p": 1.0}).document(), **changed}


def called(call):
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def test_a_kept_conversation_comes_back(tmp_path):
    path = files.save(Conversation(MESSAGES, "m", {"top_p": 0.5}), tmp_path / "new", "My talk")
    assert path == tmp_path / "new/My talk.json"
    assert files.load(path) == Conversation(MESSAGES, "m", {"top_p": 0.5})


@pytest.mark.parametrize(
    "title",
    [
        "",
        "..",
        "../x",
        "/etc/x",
        "a/b",
        "a\\b",
        ".hidden",
        "x" * 101,
        "a\0b",
        "a\nb",
        "-x",
        "~x",
        "a:b",
        "\U0001d400" * 60,  # 240 bytes
    ],
)
def test_titles_that_are_no_plain_names_are_refused(tmp_path, title):
    with pytest.raises(StageError):
        files.path_of(tmp_path, title)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"\x89PNG\r\n\x1a\n\x00\xff", "JSON in UTF-8"),
        (b"", "JSON"),
        (b"[" * 100_000, "JSON"),
        (b"[]", "format"),
        (json.dumps({"messages": MESSAGES}).encode(), "format"),
        (json.dumps(document(version=2)).encode(), "version"),
        (json.dumps(document(messages={})).encode(), "list of messages"),
        (json.dumps(document(messages=["x"])).encode(), "object"),
        (json.dumps(document(messages=[{"role": "user", "content": 3}])).encode(), "texts"),
        (json.dumps(document(messages=[{"role": "admin", "content": "x"}])).encode(), "role"),
        (json.dumps(document(messages=[{"role": "user"}])).encode(), "content"),
        (json.dumps(document(messages=[{"role": "user", "content": "", "x": 1}])).encode(), "keys"),
        (json.dumps(document(settings=[])).encode(), "settings"),
        (json.dumps(document(settings={"temperature": "<b>"})).encode(), "from 0 to 100"),
        (json.dumps(document(settings={"colour": 1})).encode(), "temperature"),
        (json.dumps(document(settings={"temperature": float("nan")})).encode(), "JSON"),
        (json.dumps(document(comment="x")).encode(), "keys"),
        (json.dumps(document(messages=[{"role": "user", "content": "\ud800"}])).encode(), "JSON"),
        (json.dumps(document(messages=[called(1)])).encode(), "tool calls"),
        (
            json.dumps(document(messages=[called({"function": {"name": "f"}})])).encode(),
            "tool calls",
        ),
        (json.dumps(document(messages=[called({"function": []})])).encode(), "tool calls"),
        (b" " * (files.MOST_BYTES + 1), "bytes"),
    ],
)
def test_other_files_are_refused_with_the_reason(data, named):
    with pytest.raises(StageError) as caught:
        files.parse(data, "file")
    assert named in caught.value.expected


def test_a_file_of_50_mb_is_not_read_whole(tmp_path):
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.truncate(50 << 20)
    with pytest.raises(StageError, match="conversation"):
        files.load(path)


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    long = Conversation([{"role": "user", "content": "x" * files.MOST_BYTES}])
    with pytest.raises(StageError):
        files.save(long, tmp_path, "long")
    assert not list(tmp_path.iterdir())
