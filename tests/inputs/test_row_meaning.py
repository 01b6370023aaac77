"""Keys of rows and messages: used, refused by name with file and line, or reported as ignored."""

import datetime
import json

import pytest

from sparselong.config import load
from sparselong.data import conversations
from sparselong.errors import StageError
from tests.conftest import ROOT

USER = {"role": "user", "content": "Two and two?"}
ANSWER = {"role": "assistant", "content": "Four."}
NAN = float("nan")
"""What pandas has in a column without a value."""
THOUGHTFUL = {"role": "assistant", "thinking": "Hm.", "content": "Four."}


@pytest.fixture
def read(data):
    """Return a function that reads one row from line 2 of a file."""

    def call(row):
        path = data([{"messages": [USER, ANSWER]}, row])
        return conversations.read(path)[1]

    return call


def assistant(**keys):
    return {"messages": [USER, {**ANSWER, **keys}]}


@pytest.mark.parametrize(
    "row",
    [
        assistant(thinking="Hm."),
        assistant(reasoning_content="Hm."),
        assistant(reasoning="Hm.", thinking=None),
        assistant(analysis="Hm.", thinking=""),
        assistant(reasoning="Hm.", reasoning_content="Hm."),
        assistant(content="<think>\nHm.\n</think>\n\nFour."),
        assistant(content="<think>Hm.</think>Four.", thinking=""),
        assistant(thinking="Hm.", channel="final"),
        {
            "messages": [
                USER,
                {"role": "assistant", "channel": "analysis", "content": "Hm.", "thinking": ""},
                {**ANSWER, "channel": "final", "thinking": None},
            ]
        },
        {"messages": [USER, {**ANSWER, "channel": "analysis", "content": "Hm."}, ANSWER]},
    ],
)
def test_reasoning_is_understood_under_its_names(read, row):
    assert read(row)["messages"] == [USER, THOUGHTFUL]


@pytest.mark.parametrize(
    ("keys", "unsupervised"),
    [
        ({"weight": 0}, True),
        ({"weight": 0.0}, True),
        ({"train": False}, True),
        ({"training": False}, True),
        ({"loss": False}, True),
        ({"weight": 1}, False),
        ({"weight": None, "train": True}, False),
    ],
)
def test_weights_are_understood(read, keys, unsupervised):
    row = read({"messages": [USER, {**ANSWER, **keys}, USER, ANSWER]})
    first = {**ANSWER, "weight": 0} if unsupervised else ANSWER
    assert row["messages"] == [USER, first, USER, ANSWER]


@pytest.mark.parametrize(
    ("keys", "variables"),
    [
        ({"reasoning_effort": "high"}, {"reasoning_effort": "high"}),
        ({"chat_template_kwargs": {"reasoning_effort": "low"}}, {"reasoning_effort": "low"}),
        (
            {"reasoning_effort": None, "chat_template_kwargs": {"model_identity": "A cat."}},
            {"model_identity": "A cat."},
        ),
        ({"chat_template_kwargs": {"enable_thinking": None}}, {}),
    ],
)
def test_variables_of_the_template_are_kept(read, keys, variables):
    row = read({**assistant(), **keys})
    assert {key: row[key] for key in row if key not in ("messages", "origin")} == variables


def test_text_parts_are_joined(read):
    parts = [{"type": "text", "text": "Two ", "image_url": None}, {"type": "text", "text": "and"}]
    row = read({"messages": [{"role": "user", "content": parts}, ANSWER]})
    assert row["messages"][0]["content"] == "Two and"


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"messages": [{**USER, "tool_calls": [{"name": "f"}]}, ANSWER]}, "`tool_calls`"),
        (assistant(function_call={"name": "f"}), "`function_call`"),
        (assistant(images=["a.png"]), "`images`"),
        (assistant(recipient="functions.f"), "`recipient`"),
        (assistant(reasoning_details=[{"text": "Hm."}]), "`reasoning_details`"),
        (assistant(loss_mask=[0, 1]), "`loss_mask`"),
        (assistant(reasoning={"effort": "high"}), "the reasoning of message 2"),
        (assistant(thinking="Hm.", reasoning="Ah."), "thinking and reasoning"),
        (assistant(content="<think>Hm. Four."), "<think>"),
        (assistant(content="Hm.\n</think>\n\nFour."), "</think>"),
        (assistant(content="<think>Hm.</think>"), "is empty"),
        (assistant(content="<think>Hm.</think>Four.", thinking="Ah."), "in <think> tags"),
        (assistant(content="analysisHm.assistantfinalFour."), "assistantfinal"),
        (assistant(content="analysisWe add.\nSo 4assistantfinalFour."), "assistantfinal"),
        (assistant(content="<|channel|>analysis<|message|>Hm."), "channel header"),
        (assistant(content="Hm. <|channel|> final <|message|>Four."), "channel header"),
        (assistant(content="<|channel|>thoughts<|message|>Hm."), "channel header"),
        (assistant(thinking="<|channel|>final<|message|>Four."), "channel header"),
        (
            assistant(
                content="<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}"
            ),
            "channel header",
        ),
        (assistant(channel="commentary"), "'commentary'"),
        (assistant(channel="analysis"), "without an answer"),
        ({"messages": [{**USER, "channel": "final"}, ANSWER]}, "'final'"),
        (
            {"messages": [USER, {**ANSWER, "channel": "analysis"}, THOUGHTFUL]},
            "reasoning of its own",
        ),
        (
            {"messages": [USER, {**ANSWER, "channel": "analysis"}, USER, ANSWER]},
            "no answer follows",
        ),
        (
            {"messages": [USER, {**ANSWER, "channel": "analysis", "weight": 0}, ANSWER]},
            "different weights",
        ),
        (assistant(weight=0.5), "`weight` 0.5"),
        (assistant(weight="0"), "`weight` '0'"),
        (assistant(weight=1, train=False), "contradicts itself"),
        (assistant(weight=0), "all have weight 0"),
        ({"messages": [{**USER, "weight": 1}, ANSWER]}, "message 1 (user) has weight 1"),
        ({**assistant(), "weight": 0}, "the row has weight 0"),
        ({**assistant(), "functions": [{"name": "f"}]}, "`functions`"),
        ({**assistant(), "images": ["a.png"]}, "`images`"),
        ({**assistant(), "reasoning_effort": "max"}, "`reasoning_effort` is 'max'"),
        ({**assistant(), "reasoning_effort": 3}, "`reasoning_effort` is int"),
        (
            {
                **assistant(),
                "reasoning_effort": "low",
                "chat_template_kwargs": {"reasoning_effort": "high"},
            },
            "contradict each other",
        ),
        ({**assistant(), "chat_template_kwargs": {"enable_thinking": True}}, "'enable_thinking'"),
        ({**assistant(), "chat_template_kwargs": "{}"}, "`chat_template_kwargs` is str"),
        ({"messages": [USER, {"role": "tool", "content": "4"}, ANSWER]}, "no tool call"),
        ({"messages": [{"role": ["user"], "content": "4"}, ANSWER]}, "role ['user']"),
        ({"messages": "[]"}, "`messages` is str"),
        (
            {"messages": [{**USER, "content": [{"type": "image_url", "image_url": "u"}]}, ANSWER]},
            "part of type 'image_url'",
        ),
        (
            {"messages": [{**USER, "content": [{"type": "text", "text": "a", "f": 1}]}, ANSWER]},
            "`f` beside its text",
        ),
        ({"messages": [{**USER, "content": ["a"]}, ANSWER]}, "part of type 'str'"),
        ({"messages": [{**USER, "content": "\ud83d!"}, ANSWER]}, "\\ud83d, at character 1"),
        (assistant(thinking="a\udc00"), "\\udc00, at character 2"),
        ({**assistant(), "model_identity": "\ud800"}, "\\ud800, at character 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_understood_is_refused_by_name(read, row, named, tmp_path):
    with pytest.raises(StageError) as raised:
        read(row)
    assert str(tmp_path / "rows.jsonl") + ", line 2" in raised.value.what
    assert named in raised.value.found
    str(raised.value).encode("utf-8")


@pytest.mark.parametrize(
    "row",
    [
        assistant(tool_calls=None, tool_call_id="", images=[], recipient="all", weight=None),
        assistant(thinking="", reasoning_content=None, channel=None),
        {**assistant(), "tools": [], "functions": None, "chat_template_kwargs": {}},
        {**assistant(), "weight": 1},
        {**assistant(tool_calls=NAN), "tools": NAN, "reasoning_effort": NAN, "weight": NAN},
        {"messages": [{**USER, "weight": 0}, ANSWER]},
    ],
)
def test_nulls_and_empty_lists_are_allowed(read, row):
    messages = [
        {key: value for key, value in message.items() if key != "weight"}
        for message in read(row)["messages"]
    ]
    assert messages == [USER, ANSWER]


@pytest.mark.parametrize(
    "content",
    [
        "`<|channel|>` marks a channel.",
        "First `<|channel|>`, then `<|message|>`.",
        "Write <|channel|> and <|message|> before the text.",
        "Write <|end|> at the end of <|message|>.",
        "The tags are <think> and </think>",
        "analysis is a word",
        "analysis of the word assistantfinal: it has fourteen letters",
        "analysis: decoded text has `assistantfinal` in it",
        "analysisHm. The word is assistantfinal",
        "analysis\nassistantfinal ends it",
    ],
)
def test_words_about_control_tokens_stay_as_they_are(read, content):
    assert read(assistant(content=content))["messages"][1]["content"] == content


def test_ignored_keys_are_recorded_with_a_count(data, tmp_path):
    row = {
        "messages": [{**USER, "name": "Ann"}, ANSWER],
        "id": 7,
        "score": 0.5,
        "none": float("nan"),
    }
    path = data([row, {**row, "label": None}, {"messages": [USER, ANSWER], "id": 8}])
    config = load(str(ROOT / "configs/tiny.yaml"), [f"data.train={path}"])
    conversations.prepare(config, tmp_path / "run")
    told, *_ = conversations.read_remarks(tmp_path / "run")
    assert "\n" not in told and str(path) in told
    for words in ("id (3 rows)", "score (2 rows)", "messages.name (2 rows)"):
        assert words in told
    assert "label" not in told


def test_a_prepared_conversation_means_the_same_and_knows_its_origin(data, tmp_path):
    row = {
        "messages": [{**ANSWER, "role": "user"}, {**THOUGHTFUL, "weight": 0}, USER, ANSWER],
        "reasoning_effort": "high",
        "origin": "a column of a hub dataset",
    }
    path = data([row] * 5)
    config = load(str(ROOT / "configs/tiny.yaml"), [f"data.train={path}"])
    files = conversations.prepare(config, tmp_path / "run")
    lines = [json.loads(line) for file in files for line in file.open(encoding="utf-8")]
    assert lines == [row for file in files for row in conversations.read(file)]
    assert all(line["messages"] == row["messages"] for line in lines)
    places = sorted(conversations.locate(line) for line in lines)
    assert places == [f"{path}, line {number}" for number in range(1, 6)]


def test_a_hub_dataset_that_was_read_as_dates_is_explained(tmp_path, monkeypatch):
    import datasets

    row = {"messages": [{**USER, "content": datetime.datetime(2024, 1, 31)}, ANSWER]}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: [row])
    config = load(str(ROOT / "configs/tiny.yaml"), ["data.train=someone/chats"])
    with pytest.raises(StageError) as raised:
        conversations.prepare(config, tmp_path)
    assert "dataset someone/chats, row 1" in raised.value.what
    assert "the content of message 1 is datetime, not text" in raised.value.found


@pytest.mark.parametrize(
    "origin", [{"source": "others.jsonl", "line": 7}, {"source": 1, "row": []}]
)
def test_a_column_that_is_called_origin_does_not_move_a_row(data, tmp_path, origin):
    """It looks like what prepared rows have, but messages must name this file."""
    path = data([{**assistant(), "origin": origin}] * 3)
    config = load(str(ROOT / "configs/tiny.yaml"), [f"data.train={path}"])
    files = conversations.prepare(config, tmp_path / "run")
    places = [conversations.locate(row) for file in files for row in conversations.read(file)]
    assert sorted(places) == [f"{path}, line {number}" for number in (1, 2, 3)]
    assert "origin (3 rows)" in conversations.read_remarks(tmp_path / "run")[0]
