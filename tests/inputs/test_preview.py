"""`03_finetune.py --preview FILE:LINE`: any row as it would be trained on; no run is touched."""

import json

import pytest

from tests.conftest import load_script

ROWS = [
    {
        "messages": [
            {"role": "user", "content": "One?"},
            {"role": "assistant", "content": "Yes, one."},
            {"role": "user", "content": "Two?"},
            {"role": "assistant", "content": "No."},
        ]
    },
    {"messages": [{"role": "user", "content": "A row that is only asked for."}]},
    {
        "messages": [
            {"role": "user", "content": "Count."},
            {"role": "assistant", "content": " ".join(map(str, range(200)))},
        ]
    },
]


@pytest.fixture
def preview(run_script, tmp_path):
    """Return a function that previews a place; nothing may appear in the run directory."""

    def call(place: str, *more: str):
        outcome = run_script(
            "03_finetune", "evaluation.tasks=[demo_hellaswag]", "--preview", place, *more
        )
        assert not (tmp_path / "run").exists()
        return outcome

    return call


def test_supervised_tokens_are_marked(preview, data):
    path = data(ROWS)
    outcome = preview(f"{path}:1")
    assert outcome.code == 0, outcome.err
    assert f"{path}, line 1: " in outcome.out
    assert "⟦<|channel|>final<|message|>Yes, one.<|end|>⟧" in outcome.out
    assert "⟦<|channel|>final<|message|>No.<|return|>⟧\n--- end: " in outcome.out
    document = json.loads(preview(f"{path}:1", "--json", "data.train_on=all").out)
    assert document["tokens"] == document["supervised"] and document["used"]


def test_the_first_conversations_of_the_training_data(preview, data):
    rows = [ROWS[0], {"text": "Evil \x1b[2J\r\x07."}, {"instruction": "a", "output": "b"}] * 4
    path = data(rows)
    outcome = preview("3", f"data.train={path}")
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("--- end: ") == 3 and outcome.out.count(f"{path}, line ") == 3
    assert all(character.isprintable() or character == "\n" for character in outcome.out)
    document = json.loads(preview("100", "--json", f"data.train={path}").out)
    lines = [each["line"] for each in document["conversations"]]
    assert len(lines) == 11 and lines == sorted(lines)  # one of twelve is held out
    assert "⟦Evil \\x1b[2J\\x0d\\x07.<|endoftext|>⟧" in document["text"]


def test_a_later_row_that_cannot_be_used_is_refused(preview, data):
    tools = [{"type": "function", "function": {"name": "f"}}]
    path = data([*[ROWS[0]] * 11, {**ROWS[0], "tools": tools}])
    preview("1", f"data.train={path}").assert_explained(f"{path}, line 12 sets `tools`")


def test_a_row_that_would_be_left_out_says_so(preview, data):
    outcome = preview(f"{data(ROWS)}:3")
    assert outcome.code == 0 and "left out: longer than sequence_len 128" in outcome.out


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("{path}", ("FILE:LINE",)),
        ("{path}:", ("FILE:LINE",)),
        ("{path}:0", ("FILE:LINE",)),
        ("{path}:-1", ("FILE:LINE",)),
        ("{path}:1.5", ("FILE:LINE",)),
        ("{path}:²", ("FILE:LINE",)),
        ("{path}:" + "9" * 5000, ("FILE:LINE",)),
        ("0", ("a number from 1",)),
        (":1", ("FILE:LINE",)),
        ("", ("FILE:LINE",)),
        ("{path}:4", ("no line 4", "1 to 3")),
        ("{path}:2", ("rows.jsonl, line 2", "no assistant turn")),
        ("{path}.gone:1", ("rows.jsonl.gone", "cannot be read")),
        ("{folder}:1", ("cannot be read",)),
    ],
)
def test_what_is_no_row_is_explained(preview, data, tmp_path, place, words):
    path = data(ROWS)
    preview(place.replace("{path}", str(path)).replace("{folder}", str(tmp_path))).assert_explained(
        *words
    )


@pytest.mark.parametrize("base", ["tiny", "/no/such/base", "nobody/no-such-model"])
def test_a_base_that_is_not_here_is_said_to_be_missing(preview, data, base):
    outcome = preview(f"{data(ROWS)}:1", f"model.base={base}")
    outcome.assert_explained(f"the tokenizer of {base} is not on this machine", "02_compress.py")


def test_other_stages_have_no_previews():
    try:
        code = load_script("02_compress").main(["--preview", "rows.jsonl:1"])
    except SystemExit as end:
        code = end.code
    assert code == 2
