"""Row layouts and tool calls: what each means, against the published template; what is refused."""

import copy
import datetime
import json
import random
import time
from collections import Counter
from importlib.resources import files
from itertools import groupby

import pytest

from sparselong.config import load
from sparselong.data import conversations, encode_files
from sparselong.data.rows import Remarks, check_row
from sparselong.errors import StageError
from sparselong.finetune.supervision import LabelledRows
from tests.conftest import ROOT, write_rows

TODAY = datetime.date(2025, 8, 5)
PUBLISHED = (files("trl") / "chat_templates/gptoss.jinja").read_text("utf-8")
HEADER = "<|start|>assistant"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "City, e.g. Köln"},
                "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
            },
            "required": ["place"],
        },
    },
}
NOW = {"type": "function", "function": {"name": "now", "description": "The time."}}
ASK = {"role": "user", "content": "Is it warm in Köln?"}
ANSWER = {"role": "assistant", "content": "Yes, 31 °C."}
RESULT = {"role": "tool", "content": '{"degrees": 31}'}


def call(arguments, name="get_weather", **keys):
    function = {"name": name, "arguments": arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": function}],
        **keys,
    }


WRITTEN = '{"place": "Köln", "unit": "C"}'
CALL = call({"place": "Köln", "unit": "C"})


@pytest.fixture(scope="module")
def tokenizer(harmony_tokenizer):
    other = copy.copy(harmony_tokenizer)
    other.chat_template = PUBLISHED
    return other


def read(row, columnar=False):
    return check_row(row, {"source": "rows.jsonl", "line": 7}, Remarks(), columnar=columnar)


def tokenize(row, tokenizer, train_on="assistant", **keys):
    return conversations.tokenize(row, tokenizer, train_on, TODAY, **keys)


def publish(tokenizer, row):
    """Return the ids that transformers makes of a row."""
    variables = {key: row[key] for key in row if key not in ("messages", "origin")}
    return tokenizer.apply_chat_template(
        row["messages"], return_dict=False, strftime_now=TODAY.strftime, **variables
    )


def supervised_pieces(row, tokenizer, **keys):
    return pieces_of(*tokenize(row, tokenizer, **keys), tokenizer)


def pieces_of(ids, supervised, tokenizer):
    pairs = zip(ids, supervised, strict=True)
    return [
        tokenizer.decode([token for token, _ in group])
        for learned, group in groupby(pairs, lambda pair: pair[1])
        if learned
    ]


def what_the_assistant_wrote(row):
    """Return the text of each turn as the documented rules of harmony have it, without a template.

    Thinking is written before the last message's answer, and before calls without a later answer.
    """
    messages, written = row["messages"], []
    answers = [
        i for i, m in enumerate(messages) if m["role"] == "assistant" and not m.get("tool_calls")
    ]
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        thinking, calls = message.get("thinking"), message.get("tool_calls")
        last = i + 1 == len(messages)
        text = ""
        if calls:
            thinking = thinking or message.get("content")
        if thinking and (last if not calls else not any(later > i for later in answers)):
            text = f"<|channel|>analysis<|message|>{thinking}<|end|>{HEADER}"
        if calls:
            function = calls[0]["function"]
            arguments = json.dumps(function["arguments"], ensure_ascii=False)
            text += f" to=functions.{function['name']}<|channel|>commentary json<|message|>"
            text += f"{arguments}<|call|>"
        else:
            end = "<|return|>" if last else "<|end|>"
            text += f"<|channel|>final<|message|>{message['content']}{end}"
        if message.get("weight", 1):
            written.append(text)
    return written


TEXTS = ("Größe 🙂", "two  spaces\n", "a <b> & 'c'", "日本語", "1,234.5", '"quoted"\\', " x")


def random_row(draw):
    """Return a row over all features of the messages layout."""
    messages, row = [], {}
    if draw.random() < 0.4:
        role = draw.choice(("system", "developer"))
        messages.append({"role": role, "content": draw.choice(TEXTS)})
    if draw.random() < 0.5:
        row["reasoning_effort"] = draw.choice(("low", "medium", "high"))
    if draw.random() < 0.2:
        row["model_identity"] = draw.choice(TEXTS)
    if draw.random() < 0.6:
        row["tools"] = [WEATHER, NOW][: draw.randint(1, 2)]
    for _ in range(draw.randint(1, 6)):
        messages.append({"role": "user", "content": draw.choice((*TEXTS, ""))})
        while draw.random() < 0.45:
            arguments = {"place": draw.choice(TEXTS), "days": [1, 2.5, None], "o": {"é": True}}
            messages.append(call(draw.choice((arguments, {})), draw.choice(("get_weather", "now"))))
            if draw.random() < 0.6:
                messages[-1][draw.choice(("content", "thinking"))] = draw.choice(TEXTS)
            if draw.random() < 0.9:
                messages.append({"role": "tool", "content": draw.choice((*TEXTS, ""))})
        if draw.random() < 0.75:
            messages.append({"role": "assistant", "content": draw.choice(TEXTS)})
            if draw.random() < 0.5:
                messages[-1]["thinking"] = draw.choice(TEXTS)
    if not any(message["role"] == "assistant" for message in messages):
        messages.append({"role": "assistant", "content": draw.choice(TEXTS)})
    turns = [message for message in messages if message["role"] == "assistant"]
    if len(turns) > 1 and draw.random() < 0.3:
        draw.choice(turns)["weight"] = 0
    return {"messages": messages, **row}


def test_200_random_rows_are_as_published_and_trained_where_the_assistant_wrote(tokenizer):
    met = Counter()
    for seed in range(200):
        row = random_row(random.Random(seed))
        ids, supervised = tokenize(read(row), tokenizer)
        assert ids == publish(tokenizer, row), seed
        pieces = pieces_of(ids, supervised, tokenizer)
        # Adjacent turns are separated by the header that starts the second.
        assert pieces == what_the_assistant_wrote(row), seed
        assert read(copy.deepcopy(row)) == read(read(row))
        met.update(message["role"] for message in row["messages"])
        met.update(key for message in row["messages"] for key in message)
        met.update([*row])
        met["long"] += sum(m["role"] == "assistant" for m in row["messages"]) > 4
    for feature in ("tool", "developer", "system", "thinking", "tool_calls", "weight", "long"):
        assert met[feature] >= 20, (feature, met)


def test_final_and_last_turn_are_parts_of_what_the_assistant_wrote(tokenizer):
    partial = Counter()
    for seed in range(100):
        given = random_row(random.Random(seed))
        for message in given["messages"]:
            message.pop("weight", None)
        row, whole = read(given), what_the_assistant_wrote(given)
        turns = [m for m in given["messages"] if m["role"] == "assistant"]
        answers = [
            text.rpartition(HEADER)[2]
            for text, turn in zip(whole, turns, strict=True)
            if "tool_calls" not in turn
        ]
        assert supervised_pieces(row, tokenizer, train_on="final") == answers, seed
        roles = "".join(message["role"][0] for message in given["messages"]).rstrip("utsd")
        count = roles.rpartition("u")[2].count("a")
        assert supervised_pieces(row, tokenizer, train_on="last_turn") == whole[-count:], seed
        ids, supervised = tokenize(row, tokenizer, "all")
        assert all(supervised) and ids == publish(tokenizer, given)
        partial["final"] += answers != whole
        partial["last_turn"] += count < len(whole)
    assert min(partial.values()) > 40


def test_final_and_last_turn_respect_weights(tokenizer):
    messages = [ASK, ANSWER, ASK, {**ANSWER, "weight": 0}, ANSWER]
    row = read({"messages": messages})
    assert len(supervised_pieces(row, tokenizer, train_on="final")) == 2
    last = supervised_pieces(row, tokenizer, train_on="last_turn")
    assert last == [f"<|channel|>final<|message|>{ANSWER['content']}<|return|>"]


def test_a_template_that_joins_reasoning_and_answer_cannot_train_the_answer(tokenizer):
    joined = copy.copy(tokenizer)
    joined.chat_template = """{% for m in messages %}<|start|>{{ m.role }}<|message|>
        {{- m.content ~ ((" because " ~ m.thinking) if m.thinking else "") }}<|end|>
        {%- endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"""
    row = read({"messages": [ASK, {**ANSWER, "thinking": "Hm."}]})
    assert supervised_pieces(row, joined) == ["<|message|>Yes, 31 °C. because Hm.<|end|>"]
    with pytest.raises(StageError, match="cannot be separated from its reasoning"):
        tokenize(row, joined, "final")


def test_a_call_is_supervised_with_its_end_and_its_result_is_not(tokenizer):
    row = read({"messages": [ASK, {**CALL, "thinking": "I look."}, RESULT], "tools": [WEATHER]})
    assert supervised_pieces(row, tokenizer) == [
        f"<|channel|>analysis<|message|>I look.<|end|>{HEADER} to=functions.get_weather"
        '<|channel|>commentary json<|message|>{"place": "Köln", "unit": "C"}<|call|>'
    ]
    text = tokenizer.decode(tokenize(row, tokenizer)[0])
    assert "namespace functions" in text and "<|start|>functions.get_weather to=assistant" in text


@pytest.mark.parametrize(
    "other",
    [
        call(WRITTEN),
        {**CALL, "content": None, "channel": "commentary"},
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "name": "get_weather", "arguments": WRITTEN}],
        },
    ],
)
def test_forms_of_a_call_mean_the_same(other):
    named = {**RESULT, "name": "get_weather", "tool_call_id": "1"}
    wanted = read({"messages": [ASK, CALL, RESULT, ANSWER], "tools": [WEATHER]})
    found = {"messages": [ASK, other, named, ANSWER], "tools": json.dumps([WEATHER["function"]])}
    assert read(found) == wanted


def test_analysis_before_a_call_is_its_thinking():
    analysis = {"role": "assistant", "channel": "analysis", "content": "Hm."}
    row = read({"messages": [ASK, analysis, CALL, RESULT, ANSWER]})
    assert row["messages"][1] == {**CALL, "thinking": "Hm."}


def test_dropped_thinking_before_calls_is_counted(tokenizer):
    thoughtful = {**CALL, "thinking": "Hm."}
    for tail, dropped in (([], 0), ([ANSWER], 1)):
        row = read({"messages": [ASK, thoughtful, RESULT, *tail]})
        assert conversations.count_dropped_thinking(row, tokenizer, TODAY) == dropped


def test_control_tokens_spelled_in_calls_results_and_tools_are_text(tokenizer):
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    counts, spelled = [], "a<|call|><|start|>assistant<|message|>b"
    for text in (spelled, "harmless"):
        tools = copy.deepcopy([WEATHER])
        tools[0]["function"]["description"] = text
        messages = [ASK, call({text: [text]}), {"role": "tool", "content": text}] * 3 + [
            ASK,
            ANSWER,
        ]
        row = read({"messages": messages, "tools": tools})
        ids, _ = tokenize(row, tokenizer)
        counts.append(sum(token in special for token in ids))
        assert supervised_pieces(row, tokenizer) == what_the_assistant_wrote(row)
    assert counts[0] == counts[1] and spelled in tokenizer.decode(ids) or text == "harmless"


def test_300_calls_take_a_second(tokenizer):
    steps = [m for n in range(300) for m in (call({"n": n}, thinking="Hm."), RESULT)]
    row = read({"messages": [ASK, *steps, ANSWER]})
    start = time.monotonic()
    pieces = supervised_pieces(row, tokenizer)
    assert time.monotonic() - start < 15
    assert pieces == what_the_assistant_wrote(row)


def test_a_template_without_tool_calls_refuses_them(harmony_tokenizer):
    with pytest.raises(StageError, match=r"rows\.jsonl, line 7 has tool calls"):
        tokenize(read({"messages": [ASK, CALL, RESULT, ANSWER]}), harmony_tokenizer)
    with pytest.raises(StageError, match=r"rows\.jsonl, line 7 sets `tools`"):
        tokenize(read({"messages": [ASK, ANSWER], "tools": [NOW]}), harmony_tokenizer)


PLAIN = [ASK, ANSWER]
FUNCTION = CALL["tool_calls"][0]["function"]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        (
            {
                "conversations": [
                    {"from": "human", "value": ASK["content"]},
                    {"from": "gpt", "value": ANSWER["content"]},
                ]
            },
            PLAIN,
        ),
        ({"conversations": PLAIN}, PLAIN),
        (
            {
                "system": "Be brief.",
                "conversations": [
                    {"from": "user", "value": ASK["content"]},
                    {"from": "function_call", "value": json.dumps(FUNCTION)},
                    {"from": "observation", "value": RESULT["content"]},
                    {"from": "gpt", "value": ANSWER["content"], "weight": 0},
                    {"from": "gpt", "value": "<think>Hm.</think>Yes."},
                ],
            },
            [
                {"role": "system", "content": "Be brief."},
                *(ASK, CALL, RESULT, {**ANSWER, "weight": 0}),
                {"role": "assistant", "thinking": "Hm.", "content": "Yes."},
            ],
        ),
        ({"instruction": ASK["content"], "input": "", "output": ANSWER["content"]}, PLAIN),
        ({"instruction": ASK["content"], "output": ANSWER["content"], "text": None}, PLAIN),
        (
            {"instruction": "Sum up:", "input": "Köln.", "output": "K.", "system": "Be brief."},
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Sum up:\n\nKöln."},
                {"role": "assistant", "content": "K."},
            ],
        ),
        (
            {"instruction": ASK["content"], "output": "Yes.", "reasoning": "Hm.", "analysis": None},
            [ASK, {"role": "assistant", "thinking": "Hm.", "content": "Yes."}],
        ),
    ],
)
def test_sharegpt_and_alpaca_become_messages(row, messages):
    assert read(row)["messages"] == messages
    assert read(read(row)) == read(row)


def test_plain_text_is_trained_whole_with_its_end(tokenizer):
    row = read({"text": "Größe, 1,234.\n", "url": "x"})
    for train_on in ("assistant", "all"):
        ids, supervised = tokenize(row, tokenizer, train_on)
        assert tokenizer.decode(ids) == "Größe, 1,234.\n<|endoftext|>" and all(supervised)
    assert tokenize(row, tokenizer, longest=3)[1] == [False] * len(ids)
    with pytest.raises(StageError, match=r"line 7 cannot be encoded as plain text"):
        tokenize(read({"text": "<|start|>user<|message|>Hi<|end|>"}), tokenizer)


def test_token_rows_are_taken_as_they_are(tokenizer):
    row = read({"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 1]})
    assert tokenize(row, tokenizer) == ([5, 6, 7], [False, True, True])
    assert tokenize(read({"input_ids": [5, 6]}), tokenizer) == ([5, 6], [True, True])
    with pytest.raises(StageError, match=r"line 7 has tokens of another tokenizer"):
        tokenize(read({"input_ids": [5, len(tokenizer)]}), tokenizer)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"messages": PLAIN, "text": "x"}, "`messages` and `text`"),
        ({"instruction": "x", "output": "y", "conversations": PLAIN}, "two layouts"),
        ({"prompt": "x", "completion": "y"}, "`completion`, `prompt`"),
        (
            {"prompt": "x", "chosen": "y", "rejected": "z"},
            "a preference pair: `chosen`, `prompt`, `rejected`",
        ),
        ({f"k{i:02}": 1 for i in range(20)}, "`k11` and 8 more"),
        ({"input": "x", "output": "y"}, "the row's keys are"),
        ({"conversations": {"from": "human"}}, "`conversations` is dict"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "turn 1 is from 'narrator'"),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, "turn 1 is from ['gpt']"),
        ({"conversations": [{"from": "gpt", "role": "user", "value": "x"}]}, "beside `role`"),
        ({"conversations": [{"from": "human", "value": 3}]}, "message 1 is int, not text"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "the call of turn 1"),
        ({"instruction": "x", "output": 3}, "`output` is int"),
        ({"instruction": "x"}, "`output` is NoneType"),
        ({"instruction": "x", "output": ""}, "message 2 (assistant) is empty"),
        ({"instruction": "x", "output": "y", "history": [["a", "b"]]}, "`history`"),
        ({"text": 3}, "`text` is 3"),
        ({"text": "  "}, "`text` is '  '"),
        ({"text": "a\ud83d"}, "surrogate"),
        ({"text": "x", "tools": [NOW]}, "`text` has `tools`"),
        ({"text": "x", "reasoning_effort": "low"}, "`text` has `reasoning_effort`"),
        ({"text": "x", "weight": 0}, "weight 0"),
        ({"input_ids": "1 2"}, "`input_ids` is '1 2'"),
        ({"input_ids": [1, True]}, "`input_ids` is [1, True]"),
        ({"input_ids": [1, -1]}, "`input_ids` is [1, -1]"),
        ({"input_ids": [1, 2], "labels": [1]}, "2 entries, but `labels` 1"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, "label 1 is 2, token 1 is 1"),
        ({"input_ids": [1, 2], "labels": [-100, -100]}, "all labels are -100"),
        ({"input_ids": [1, 2], "attention_mask": [1, 0]}, "`attention_mask`"),
        ({"input_ids": [1, 2], "position_ids": [0, 0]}, "`position_ids`"),
        ({"input_ids": [1, 2], "completion_mask": [0, 1]}, "`completion_mask`: [0, 1]"),
        ({"messages": PLAIN, "loss_mask": [0, 1]}, "the row has `loss_mask`"),
        ({"messages": [ASK, {**ANSWER, "assistant_masks": [1]}]}, "has `assistant_masks`"),
        ({"messages": [ASK, call("{"), RESULT]}, "the arguments of message 2"),
        ({"messages": [ASK, call("[1]"), RESULT]}, "arguments of message 2 are list"),
        ({"messages": [ASK, call({"a": "\ud83d"})]}, "surrogate"),
        ({"messages": [ASK, {**CALL, "tool_calls": CALL["tool_calls"] * 2}]}, "2 tool calls"),
        ({"messages": [ASK, {**CALL, "tool_calls": [{"function": {}}]}]}, "the tool call {"),
        ({"messages": [ASK, {**CALL, "tool_calls": [{"name": "f", "x": 1}]}]}, "has `x`"),
        (
            {"messages": [ASK, {**CALL, "tool_calls": [{"name": "f", "type": "custom"}]}]},
            "has the type 'custom'",
        ),
        ({"messages": [ASK, {**CALL, "content": "a", "thinking": "b"}]}, "beside its tool call"),
        ({"messages": [ASK, {**CALL, "channel": "analysis"}]}, "but has a tool call"),
        ({"messages": [ASK, CALL, RESULT, RESULT]}, "message 3 has no tool call"),
        ({"messages": [ASK, CALL, {**RESULT, "name": "other"}]}, "the name 'other'"),
        ({"messages": [ASK, CALL, {**RESULT, "content": {"a": 1}}]}, "message 3 is dict"),
        ({"messages": [ASK, {**ANSWER, "tool_call_id": "1"}]}, "`tool_call_id`"),
        ({"messages": [ASK, {**ANSWER, "Weight": 0}]}, "message 2 has 'Weight': 0"),
        ({"messages": [ASK, {**ANSWER, "toolCalls": [{"name": "f"}]}]}, "has 'toolCalls'"),
        ({"messages": [ASK, {**ANSWER, "reasoning_effort": "low"}]}, "`reasoning_effort`: 'low'"),
        ({"messages": PLAIN, "reasoningEffort": "low"}, "the row has 'reasoningEffort'"),
        ({"instruction": "x", "output": "y", "Input": "z"}, "the row has 'Input'"),
        ({"instruction": "x", "output": "y", "thinking": ["z"]}, "thinking of message 2"),
        ({"messages": PLAIN, "system": "Be brief."}, "`system` beside its messages: 'Be brief.'"),
        ({"instruction": "x", "output": "y", "system_prompt": "Be brief."}, "`system_prompt` besi"),
        ({"messages": PLAIN, "tools": {"a": 1}}, "`tools` is dict"),
        ({"messages": PLAIN, "tools": "[{]"}, "`tools`: "),
        ({"messages": PLAIN, "tools": [{"type": "web_search"}]}, "tool 1 is"),
        ({"messages": PLAIN, "tools": [{"name": "f", "parameters": "x"}]}, "parameters of tool 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_malformed_or_mixed_is_refused_with_file_and_line(tmp_path, row, named):
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": PLAIN}, row])
    with pytest.raises(StageError) as raised:
        conversations.read(path)
    assert f"{path}, line 2" in raised.value.what
    assert named in raised.value.found


def test_a_system_text_that_the_first_message_repeats_is_accepted_and_other_keys_are_counted():
    messages = [{"role": "system", "content": "Be brief. Be kind."}, ASK, ANSWER]
    remarks = Remarks()
    row = {"messages": messages, "system": "Be brief.", "system_prompt": None, "tooling": "x"}
    assert check_row(row, {"source": "x", "line": 1}, remarks)["messages"] == messages
    assert dict(remarks.ignored) == {"system": 1, "tooling": 1}


def test_nulls_that_a_table_fills_in_are_not_taken_for_values():
    padded = {"messages": [ASK, call({"place": "Köln", "unit": None})]}
    assert read(padded)["messages"][1]["tool_calls"][0]["function"]["arguments"]["unit"] is None
    with pytest.raises(StageError, match="JSON text"):
        read(padded, columnar=True)
    with pytest.raises(StageError, match="`tools` holds null"):
        tools = [{"name": "f", "parameters": {"properties": {"a": None}}}]
        read({"messages": PLAIN, "tools": tools}, columnar=True)
    text = {"messages": [ASK, call(json.dumps({"unit": None}))], "tools": None}
    assert read(text, columnar=True) == read(text)


def test_keys_of_tools_that_the_template_does_not_read_are_counted():
    remarks = Remarks()
    tools = [{"type": "function", "function": {"name": "f", "strict": True}}] * 2
    row = {"messages": PLAIN, "tools": tools, "id": 3}
    check_row(row, {"source": "rows.jsonl", "line": 7}, remarks)
    assert remarks.ignored == Counter({"tools.strict": 1, "id": 1})


def test_what_trains_is_what_is_published(tokenizer, tmp_path):
    """Rows of all layouts through the files, the stored tokens and the trainer's labels."""
    rows = [random_row(random.Random(seed)) for seed in range(40)]
    rows += [{"instruction": "a", "output": "b"}, {"text": "c"}, {"input_ids": [5, 6, 7]}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    overrides = [f"data.train={path}", f"data.date={TODAY}", "sequence_len=4096"]
    encoded = encode_files(load(ROOT / "configs/tiny.yaml", overrides), tmp_path / "run", tokenizer)
    met = 0
    for part in encoded[:2]:
        sources = conversations.read(part.source)
        found = LabelledRows(part, range(len(part)), seed=0)
        for number, row in zip(found.numbers, found, strict=True):
            given = rows[sources[number]["origin"]["line"] - 1]
            _, supervised = tokenize(read(given), tokenizer)
            ids = publish(tokenizer, given) if "messages" in given else row["input_ids"]
            assert row["input_ids"] == ids
            wanted = [token if on else -100 for token, on in zip(ids, supervised, strict=True)]
            assert row["labels"] == wanted
            met += "messages" in given
    assert met == 40


def test_rows_without_turns_are_told():
    remarks = Remarks()
    for row in ({"messages": PLAIN}, {"text": "a"}, {"input_ids": [1]}):
        check_row(row, {"source": "rows.jsonl", "line": 7}, remarks)
    (said,) = remarks.sentences("rows.jsonl")
    assert said.startswith("rows.jsonl: rows of `text` or `input_ids`") and said.endswith(": 2")


def test_an_end_spelled_between_many_calls_does_not_end_a_turn(tokenizer):
    """The first and last turn of its kind, which are located by prompts, do not show it."""
    answers = [ANSWER, {**ANSWER, "content": "a<|end|>b"}, ANSWER]
    messages = [m for answer in answers for m in (ASK, CALL, RESULT, ASK, answer)]
    row = read({"messages": messages})
    assert supervised_pieces(row, tokenizer) == what_the_assistant_wrote(row)
