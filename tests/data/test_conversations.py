"""Conversations: refused rows and their location, reproducibility, and supervised tokens."""

import datetime
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from sparselong.config import schema as config_module
from sparselong.data import conversations
from sparselong.errors import StageError

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}

# Renders text conversations like openai/gpt-oss: reasoning and <|return|> for the last message
# only, history without reasoning. A shorter template with the same rules.
HARMONY = """{% for m in messages %}{% if m.role != 'assistant' %}
{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}
{%- elif loop.last and not add_generation_prompt %}
{%- if 'thinking' in m %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking }}
{{- '<|end|>' }}{% endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}
{%- else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""


def load_config(**data):
    overrides = [
        f"{key}={value}" if key == "seed" else f"data.{key}={value}" for key, value in data.items()
    ]
    return config_module.load("configs/tiny.yaml", overrides)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chats(count):
    return [{"messages": [{"role": "user", "content": f"{i}?"}, ASSISTANT]} for i in range(count)]


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte, with each harmony token kept whole, as in the real tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ("start", "channel", "message", "end", "return")
    inner.add_special_tokens([f"<|{name}|>" for name in special])
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=HARMONY)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "not JSON"),
        ("null", "null"),
        ("[1]", "list instead of an object"),
        ('{"prompt": "x", "completion": "y"}', "no list under `messages`"),
        ('{"conversations": []}', "no assistant turn"),
        ('{"messages": ["x"]}', "message 1 is a str"),
        (
            '{"messages": [{"role": "critic", "content": "x"}]}',
            "expected: one of the roles system, ",
        ),
        ('{"messages": [{"role": "user", "content": null}]}', "NoneType, not text"),
        (
            '{"messages": [{"role": "user", "content": "x"}]}',
            "expected: at least one assistant turn\nfound:    no assistant turn",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "x"}]}',
            "starts with an assistant message",
        ),
        (json.dumps({"messages": [USER, {**ASSISTANT, "content": " "}]}), "is empty"),
        (json.dumps({"messages": [USER, {**ASSISTANT, "thinking": 3}]}), "thinking of message 2"),
        (
            json.dumps({"messages": [USER, {**USER, "role": "system"}, ASSISTANT]}),
            "only the first message",
        ),
    ],
)
def test_malformed_row_is_refused_with_file_and_line(tmp_path, line, reason):
    path = write_rows(tmp_path / "rows.jsonl", chats(1))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(StageError) as raised:
        conversations.prepare(load_config(train=path), tmp_path / "run")
    assert f"{path}, line 2" in raised.value.what
    assert reason in str(raised.value)
    assert not (tmp_path / "run/data/source.json").exists()


def test_invalid_utf8_is_refused_with_the_location(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes((json.dumps(chats(1)[0]) + "\n").encode() + b'{"messages": "\xff"}\n')
    with pytest.raises(StageError, match="rows.jsonl"):
        conversations.read(path)


def test_empty_and_missing_files_are_refused(tmp_path):
    with pytest.raises(StageError, match="is empty"):
        conversations.read(write_rows(tmp_path / "empty.jsonl", []))
    with pytest.raises(StageError, match="cannot be read"):
        conversations.prepare(load_config(train=tmp_path / "none.jsonl"), tmp_path / "run")
    with pytest.raises(StageError, match="too small"):
        one = write_rows(tmp_path / "one.jsonl", chats(1))
        conversations.prepare(load_config(train=one), tmp_path / "run")


def test_unreachable_hub_is_explained(tmp_path, monkeypatch):
    import datasets

    def fail(*arguments, **keywords):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(StageError, match=r"(?s)someone/chats cannot be opened.*data.train=FILE"):
        conversations.prepare(load_config(train="someone/chats"), tmp_path)


def test_hub_rows_are_checked_and_reduced_to_messages(tmp_path, monkeypatch):
    import datasets

    rows = [{"lang": "x", "messages": [{**USER, "thinking": None}, {**ASSISTANT, "thinking": "t"}]}]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows * 2)
    files = conversations.prepare(load_config(train="someone/chats"), tmp_path)
    (row,) = conversations.read(files.train)
    assert row["messages"] == [USER, {**ASSISTANT, "thinking": "t"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: [*rows, {"messages": []}])
    with pytest.raises(StageError, match="someone/chats, row 2"):
        conversations.prepare(load_config(train="someone/chats"), tmp_path / "other")


def test_split_is_seeded_complete_and_reused(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", chats(40))
    config = load_config(train=path, validation_fraction=0.1)
    files = conversations.prepare(config, tmp_path / "a")
    train, validation = conversations.read(files.train), conversations.read(files.validation)
    assert (len(train), len(validation)) == (36, 4)
    found = sorted(str(row["messages"]) for row in train + validation)
    assert found == sorted(str(row["messages"]) for row in chats(40))
    again = conversations.prepare(config, tmp_path / "b")
    assert files.validation.read_bytes() == again.validation.read_bytes()
    other_seed = config.model_copy(update={"seed": 1})
    assert validation != conversations.read(conversations.prepare(other_seed, tmp_path / "c")[1])


def test_the_split_of_one_source_is_as_it_was(tmp_path):
    """Runs of earlier versions must find the rows that they trained on."""
    path = write_rows(tmp_path / "rows.jsonl", chats(40))
    config = load_config(train=path, validation_fraction=0.1)
    files = conversations.prepare(config, tmp_path / "a")
    held_out = set(random.Random(config.seed).sample(range(40), 4))
    lines = [row["origin"]["line"] for row in conversations.read(files.train)]
    assert lines == [i + 1 for i in range(40) if i not in held_out]


def mix(tmp_path, weights, **more):
    """Return the prepared rows of three sources of 60, 20 and 20 rows, and what is told."""
    sizes = {"a": 60, "b": 20, "c": 20}
    shares = []
    for (name, size), weight in zip(sizes.items(), weights, strict=True):
        path = write_rows(tmp_path / f"{name}.jsonl", chats(size))
        shares.append({"source": str(path)} | ({"weight": weight} if weight else {}))
    config = load_config(train=json.dumps(shares), validation_fraction=0.1, **more)
    run_dir = tmp_path / f"run {weights} {more}"
    files = conversations.prepare(config, run_dir)
    rows = [conversations.read(file) for file in files]
    return [
        Counter((Path(row["origin"]["source"]).stem, row["origin"]["line"]) for row in part)
        for part in rows
    ], conversations.read_remarks(run_dir)


def of_source(counts, name):
    return [count for (source, _), count in counts.items() if source == name]


def test_several_sources_are_all_used(tmp_path):
    (train, validation), said = mix(tmp_path, (None, None, None))
    assert (train.total(), validation.total(), set(train.values())) == (90, 10, {1})
    assert not set(train) & set(validation)
    folder = tmp_path / "a.jsonl"
    assert said[0] == (
        "validation: 10 conversations held out: "
        + ", ".join(
            f"{n} of {folder.with_stem(name)}" for name, n in (("a", 6), ("b", 2), ("c", 2))
        )
    )
    assert all("nearly repeat" in sentence for sentence in said[1:])


def test_each_source_with_two_rows_gives_validation_rows(tmp_path):
    shares = []
    for name, size in (("a", 60), ("b", 2), ("c", 1), ("d", 8), ("e", 1)):
        path = write_rows(tmp_path / f"{name}.jsonl", chats(size))
        shares.append({"source": str(path)})

    def held_out(*sources):
        config = load_config(train=json.dumps(sources), validation_fraction=0.05)
        files = conversations.prepare(config, tmp_path / f"run {len(sources)}")
        rows = conversations.read(files.validation)
        return Counter(Path(row["origin"]["source"]).stem for row in rows)

    assert held_out(*shares) == {"a": 3, "b": 1, "d": 1}
    assert held_out(shares[2], shares[4]) == {"e": 1}


def test_weights_repeat_and_leave_out_rows(tmp_path):
    (train, validation), said = mix(tmp_path, (1.0, 1.0, 8.0))
    assert not set(train) & set(validation) and validation.total() == 10
    sums = [sum(of_source(train, name)) for name in "abc"]
    assert sums == [9, 9, 72] and train.total() == 90
    assert set(of_source(train, "a")) == {1}
    repeats = of_source(train, "c")
    assert max(repeats) - min(repeats) <= 1 and len(repeats) == 20 - len(of_source(validation, "c"))
    assert "9 training examples (10.0%)" in said[1] and "72 training examples (80.0%)" in said[3]
    again, _ = mix(tmp_path, (1.0, 1.0, 8.0))
    assert again == [train, validation]
    assert mix(tmp_path, (1.0, 1.0, 8.0), seed=1)[0] != again


def test_a_source_that_gets_no_example_is_refused(tmp_path):
    with pytest.raises(StageError, match=r"b\.jsonl cannot have the weight 1e-05"):
        mix(tmp_path, (1.0, 1e-5, 1.0))


def test_a_changed_one_of_several_sources_is_refused(tmp_path):
    mix(tmp_path, (1.0, 2.0, 3.0))
    path = write_rows(tmp_path / "b.jsonl", chats(21))
    shares = [
        {"source": str(tmp_path / f"{name}.jsonl"), "weight": w}
        for name, w in (("a", 1.0), ("b", 2.0), ("c", 3.0))
    ]
    config = load_config(train=json.dumps(shares), validation_fraction=0.1)
    with pytest.raises(StageError, match=r"b\.jsonl has changed since"):
        conversations.prepare(config, tmp_path / "run (1.0, 2.0, 3.0) {}")
    write_rows(path, chats(20))
    run_dir = tmp_path / "run (1.0, 2.0, 3.0) {}"
    found = conversations.find_sources(config, run_dir)
    assert [*found] == [f"data.train[{i}].source" for i in range(3)]


def test_prepared_files_are_reused_rebuilt_or_refused(tmp_path):
    path, run_dir = write_rows(tmp_path / "rows.jsonl", chats(20)), tmp_path / "run"
    config = load_config(train=path, validation_fraction=0.1)
    files = conversations.prepare(config, run_dir)
    stamp = files.train.stat().st_mtime_ns
    assert conversations.prepare(config, run_dir).train.stat().st_mtime_ns == stamp
    larger = load_config(train=path, validation_fraction=0.5)
    assert len(conversations.read(conversations.prepare(larger, run_dir).validation)) == 10
    write_rows(path, chats(21))
    with pytest.raises(StageError, match="has changed since"):
        conversations.prepare(larger, run_dir)
    write_rows(path, chats(20))
    files.train.write_text("")
    with pytest.raises(StageError, match="train.jsonl has changed since"):
        conversations.prepare(larger, run_dir)


def test_interrupted_preparation_does_not_count_as_done(tmp_path):
    path, run_dir = write_rows(tmp_path / "rows.jsonl", chats(20)), tmp_path / "run"
    files = conversations.prepare(load_config(train=path), run_dir)
    whole = files.train.read_text()
    (run_dir / "data/source.json").unlink()
    files.validation.unlink()
    files.train.with_name("validation.jsonl.partial").write_text(whole[:30])
    assert conversations.prepare(load_config(train=path), run_dir).train.read_text() == whole


def tokenize(messages, tokenizer, train_on="assistant"):
    row = {"messages": messages}
    return conversations.tokenize(row, tokenizer, train_on, datetime.date(2025, 8, 5))


def supervised_text(messages, tokenizer):
    ids, supervised = tokenize(messages, tokenizer)
    assert len(ids) == len(supervised)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(ids) == rendered
    kept = [token if on else None for token, on in zip(ids, supervised, strict=True)]
    pieces, piece = [], []
    for token in [*kept, None]:
        if token is None and piece:
            pieces.append(tokenizer.decode(piece))
        piece = [] if token is None else [*piece, token]
    return pieces


def test_exactly_the_assistant_turns_are_supervised(tokenizer):
    messages = [
        USER,
        ASSISTANT,
        {"role": "user", "content": "Größe?"},
        {**ASSISTANT, "thinking": "t"},
    ]
    assert supervised_text(messages, tokenizer) == [
        "<|channel|>final<|message|>Hello<|end|>",
        "<|channel|>analysis<|message|>t<|end|><|start|>assistant<|channel|>final<|message|>"
        "Hello<|return|>",
    ]


def test_reasoning_dropped_by_the_template_is_not_supervised(tokenizer):
    thoughtful = {**ASSISTANT, "thinking": "t"}
    assert supervised_text([USER, thoughtful, USER, ASSISTANT, USER], tokenizer) == [
        "<|channel|>final<|message|>Hello<|end|>",
        "<|channel|>final<|message|>Hello<|end|>",
    ]


def test_template_that_shows_reasoning_of_the_last_assistant_turn_only(tokenizer):
    """A truncated conversation would show reasoning that the whole one does not."""
    template = """{% set last = messages | selectattr('role', 'eq', 'assistant') | list | last %}
    {%- for m in messages %}{% if m.role != 'assistant' %}
    {{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% else %}
    {%- if m.thinking and m is sameas last %}
    {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}
    {{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
    {{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
    {%- endif %}{% endfor %}
    {%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer._tokenizer, chat_template=template)
    thoughtful = [USER, {**ASSISTANT, "thinking": "s"}, USER, {**ASSISTANT, "thinking": "t"}]
    assert supervised_text(thoughtful, tokenizer) == [
        "<|channel|>final<|message|>Hello<|end|>",
        "<|channel|>analysis<|message|>t<|end|><|start|>assistant<|channel|>final<|message|>"
        "Hello<|return|>",
    ]


def test_all_tokens_are_supervised_on_request(tokenizer):
    ids, supervised = tokenize([USER, ASSISTANT], tokenizer, "all")
    assert ids and all(supervised)


def test_template_that_rewrites_history_is_refused(tokenizer):
    rewriting = "{{ messages | length }}" + HARMONY
    strange = type(tokenizer)(tokenizer_object=tokenizer._tokenizer, chat_template=rewriting)
    with pytest.raises(StageError, match="rewrites earlier turns"):
        tokenize([USER, ASSISTANT], strange)
    refusing = type(tokenizer)(
        tokenizer_object=tokenizer._tokenizer, chat_template="{{ raise_exception('no roles') }}"
    )
    with pytest.raises(StageError, match="no roles"):
        tokenize([USER, ASSISTANT], refusing)
