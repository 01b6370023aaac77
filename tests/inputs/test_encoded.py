"""The encoded rows: the same tokens for every stage, one rule of length, no inferred types."""

import datetime
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow
import pytest
import torch

from sparselong.compress.calibration import calibration_tokens
from sparselong.config import Config, load
from sparselong.data import (
    conversations,
    describe_lengths,
    encode_files,
    rendering_date,
    select_usable,
)
from sparselong.data.encoding import _SCHEMA, Encoded, EncodedFiles
from sparselong.errors import StageError
from sparselong.finetune.batches import Batches, take_tokens
from sparselong.finetune.supervision import LabelledRows
from sparselong.model import load_tokenizer
from tests.conftest import ROOT, write_rows


def chat(question: str, answer: str, **more) -> dict:
    assistant = {"role": "assistant", "content": answer, **more}
    return {"messages": [{"role": "user", "content": question}, assistant]}


ROWS = [chat(f"Count to {n}.", " ".join(map(str, range(n)))) for n in range(1, 41)]

OTHERS = [chat(f"Count down from {n}.", " ".join(map(str, range(n, 0, -1)))) for n in range(1, 41)]


@pytest.fixture(scope="module")
def tokenizer(untrained_base):
    return load_tokenizer(untrained_base)


@pytest.fixture
def config(tmp_path):
    """Return a function that makes the config of a run on rows, with overrides."""

    def make(rows: list, *more: str, validation: list | None = None) -> Config:
        data = [f"data.train={write_rows(tmp_path / 'rows.jsonl', rows)}"]
        if validation:
            path = write_rows(tmp_path / "held_out.jsonl", validation)
            data.append(f"data.validation={path}")
        return load(ROOT / "configs/tiny.yaml", [*data, "sequence_len=128", *more])

    return make


def tokens_of(encoded, tokenizer, train_on="assistant") -> list:
    rows, today = conversations.read(encoded.source), datetime.date.today()
    return [conversations.tokenize(row, tokenizer, train_on, today) for row in rows]


LATE = [chat(f"{n}?", "Yes.") for n in range(1200)] + [chat("Last?", "No.", thinking="Hm.")]
KINDS = {
    "dates only": [chat("2026-01-31", f"2026-02-{day:02}") for day in range(1, 20)],
    "numbers and null": [chat("1", "null"), chat("1.5", "true"), chat("", "NaN")] * 3,
    "thinking only in the last row": LATE,
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_mean_the_same_whatever_their_text_looks_like(config, tokenizer, tmp_path, kind):
    files = encode_files(config(KINDS[kind], validation=KINDS[kind]), tmp_path / "run", tokenizer)
    expected = tokens_of(files.train, tokenizer)
    assert [files.train[row] for row in range(len(files.train))] == expected
    assert files.train.counts == [(len(s), sum(s), sum(s[1:])) for _, s in expected]


def test_calibration_has_the_tokens_that_it_had_before(config, tokenizer, tmp_path):
    """Shuffled by the seed, with conversations of any length, concatenated and cut."""
    settings = ("calibration.samples=6", "calibration.sequence_len=64", "sequence_len=110")
    made = config(ROWS, *settings, "seed=3")
    train = encode_files(made, tmp_path / "run", tokenizer).train
    rows = tokens_of(train, tokenizer, "all")
    random.Random(3).shuffle(rows)
    stream = [token for tokens, _ in rows for token in tokens]
    assert (
        calibration_tokens(made, train).tolist()
        == torch.tensor(stream[: 6 * 64]).reshape(6, 64).tolist()
    )


def change_template(tokenizer, run_dir):
    tokenizer.chat_template = tokenizer.chat_template.replace("Reasoning", "Thinking")


def cut_file(tokenizer, run_dir):
    path = run_dir / "data/encoded/train.arrow"
    path.write_bytes(path.read_bytes()[:-100])


def change_token(tokenizer, run_dir):
    path = run_dir / "data/encoded/validation.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_record(tokenizer, run_dir):
    (run_dir / "data/encoded/encoded.json").write_text('{"made_from": ')


@pytest.mark.parametrize(
    "change", [None, change_template, cut_file, change_token, cut_record, "data.train_on=all"]
)
def test_rows_are_encoded_once_unless_something_changed(
    config, untrained_base, tmp_path, monkeypatch, change
):
    tokenizer, run_dir = load_tokenizer(untrained_base), tmp_path / "run"
    encode_files(config(ROWS), run_dir, tokenizer)
    tokenizer(["some text"], padding=True, truncation=True, max_length=5)  # leaves its settings
    encoded, tokenize = [], conversations.tokenize
    monkeypatch.setattr(
        conversations, "tokenize", lambda *given: encoded.append(given) or tokenize(*given)
    )
    if callable(change):
        change(tokenizer, run_dir)
    made = config(ROWS, change) if isinstance(change, str) else config(ROWS)
    files = encode_files(made, run_dir, tokenizer)
    assert len(encoded) == (40 if change else 0)
    expected = tokens_of(files.validation, tokenizer, made.data.train_on)
    assert [files.validation[row] for row in range(len(files.validation))] == expected


def test_processes_that_encode_at_once_read_the_same_rows(config, tokenizer, tmp_path):
    """As the ranks of a run, whose stage has prepared the files and fixed the date."""
    made = config(ROWS)
    conversations.prepare(made, tmp_path / "run")
    rendering_date(made, tmp_path / "run")
    with ThreadPoolExecutor(3) as pool:
        several = list(
            pool.map(lambda _: encode_files(made, tmp_path / "run", tokenizer), range(3))
        )
    assert all(files.train.table == several[0].train.table for files in several)
    names = {path.name for path in (tmp_path / "run/data/encoded").iterdir()}
    assert names == {"train.arrow", "validation.arrow", "encoded.json"}


def test_an_interrupted_encoding_leaves_nothing_behind(config, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(conversations, "tokenize", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode_files(config(ROWS), tmp_path / "run", tokenizer)
    assert list((tmp_path / "run/data/encoded").iterdir()) == []


def test_stages_03_and_04_leave_out_the_same_rows_and_say_so(config, tokenizer, tmp_path):
    made = config(ROWS, validation=OTHERS[10:20])
    files = encode_files(made, tmp_path / "run", tokenizer)
    usable = select_usable(files, made.sequence_len)
    lengths = [count.tokens for count in files.validation.counts]
    assert usable.validation == [row for row, n in enumerate(lengths) if n <= 128]
    assert 0 < len(usable.validation) < len(lengths)
    rows = LabelledRows(files.validation, usable.validation, made.seed)
    assert sorted(rows.numbers) == usable.validation
    alike, *others = usable.left_out
    assert "nearly repeat" in alike
    assert [text.partition(":")[0] for text in others] == ["train", "validation"]
    left_out = len(lengths) - len(usable.validation)
    assert f"{left_out} of 10 conversations left out: {left_out} longer than" in others[1]
    longer = config(ROWS, "sequence_len=4096", validation=OTHERS[10:20])
    files = encode_files(longer, tmp_path / "run", tokenizer)
    assert select_usable(files, 4096).left_out == [alike]


def test_thinking_that_the_template_drops_is_told_with_counts(config, tokenizer, tmp_path):
    twice = chat("One?", "Yes.", thinking="Dropped.")["messages"] * 2
    rows = [{"messages": [*twice, *chat("Two?", "No.", thinking="Kept.")["messages"]]}, *ROWS[:3]]
    files = encode_files(
        config(rows, "sequence_len=4096", validation=OTHERS[:3]), tmp_path / "run", tokenizer
    )
    (told,) = select_usable(files, 4096).left_out
    assert told == (
        "train: the chat template leaves out the thinking of 2 turns, in 1 of 4 conversations"
    )


@pytest.mark.parametrize("validation", [None, ROWS[38:]], ids=["all rows", "validation"])
def test_the_length_that_would_do_is_named(config, tokenizer, tmp_path, validation):
    files = encode_files(config(ROWS, validation=validation), tmp_path / "run", tokenizer)
    limit = 20 if validation is None else max(c.tokens for c in files.train.counts[:20])
    with pytest.raises(StageError) as refusal:
        select_usable(files, limit)
    name, total = ("validation", 2) if validation else ("train", len(files.train))
    assert f"no {name} conversation can be used" in refusal.value.what
    assert f"{name}: {total} of {total} conversations left out: {total} longer than" in (
        refusal.value.found
    )
    needed = int(refusal.value.fix.partition("sequence_len=")[2].partition(",")[0])
    longer = config(ROWS, f"sequence_len={needed}", validation=validation)
    assert select_usable(encode_files(longer, tmp_path / "run", tokenizer), needed).train
    with pytest.raises(StageError):
        select_usable(files, needed - 1)


def test_rows_without_supervised_tokens_are_left_out(tmp_path):
    def encoded(name, *rows):
        columns = [
            {"input_ids": [1] * len(s), "supervised": list(map(bool, s)), "dropped_thinking": 0}
            for s in rows
        ]
        return Encoded(tmp_path / name, pyarrow.Table.from_pylist(columns))

    train = encoded("train.jsonl", [0, 1], [0, 0], [1, 0, 0])  # nothing predicts a first token
    files = EncodedFiles(train, train, datetime.date(2026, 1, 31))
    usable = select_usable(files, 8)
    assert usable.train == [0] and "2 without supervised tokens" in usable.left_out[0]
    none = encoded("validation.jsonl", [0, 0])
    with pytest.raises(StageError) as refusal:
        select_usable(files._replace(validation=none), 8)
    assert "validation" in refusal.value.what and "weights" in refusal.value.fix


def test_too_short_a_sequence_is_refused_before_any_work(run_script, tmp_path):
    outcome = run_script("02_compress", "sequence_len=16", "evaluation.tasks=[demo_hellaswag]")
    outcome.assert_explained("train: 38 of 38 conversations left out", "sequence_len=")
    assert not list((tmp_path / "run").rglob("*.safetensors"))


@pytest.mark.parametrize("packed", [True, False])
def test_padding_tokens_in_text_are_tokens(packed):
    """The count is taken before padding, not from the tokens."""
    rows = [{"input_ids": [7, 0, 0], "labels": [7, 0, 0]}, {"input_ids": [0], "labels": [0]}]
    seen = []

    def collate(given):
        seen.extend(given[0] if packed else given)
        return {"input_ids": torch.zeros(2, 8), "labels": torch.zeros(2, 8)}

    batches = Batches(rows, [[[0, 1]] if packed else [[0], [1]]], collate, packed, pad_token=0)
    assert take_tokens(batches[0]) == 4
    extra = {"position_ids": [0, 1, 2]} if packed else {"attention_mask": [1, 1, 1]}
    assert seen[0] == rows[0] | extra


def test_a_conversation_that_is_too_long_is_encoded_without_being_located(
    config, untrained_base, tmp_path
):
    """Otherwise a template that must be rendered for each turn takes minutes for nothing."""
    tokenizer = load_tokenizer(untrained_base)
    tokenizer.chat_template = (
        "{{ messages | length if messages | length > 2 }}" + tokenizer.chat_template
    )
    long = {"messages": chat("Why?", "Because.")["messages"] * 40}
    made = config([chat("a", "b"), long], validation=[chat("c", "d")])
    first, second = encode_files(made, tmp_path, tokenizer).train.counts
    assert first.supervised and second.tokens > 128 and not second.supervised


def test_the_shortest_length_that_would_do_is_that_of_a_long_conversation(
    config, tokenizer, tmp_path
):
    made = config(ROWS, "sequence_len=16", validation=ROWS[:1])
    files = encode_files(made, tmp_path / "run", tokenizer)
    with pytest.raises(StageError) as refusal:
        select_usable(files, 16)
    assert f"sequence_len={min(count.tokens for count in files.train.counts)}," in refusal.value.fix


def test_lengths_and_tokens_are_described():
    lengths = {1: 2, 2: 1, 3: 1, 4: 1, 9: 4, 64: 1, 65: 7}
    flags = [[n % 2 == 0] * n for n, times in lengths.items() for _ in range(times)]
    rows = [{"input_ids": [1] * len(f), "supervised": f, "dropped_thinking": 0} for f in flags]
    encoded = Encoded(Path("train.jsonl"), pyarrow.Table.from_pylist(rows, _SCHEMA))
    said = describe_lengths(encoded, [*range(len(rows) - 7)])
    assert said == [
        "train: 10 conversations, 111 tokens, 70 of them supervised (63.1%); lengths 1 to 64, "
        "half up to 4, 95 % up to 9",
        f"  up to         1 tokens         2 {'#' * 20}",
        f"  up to         2 tokens         1 {'#' * 10}",
        f"  up to         4 tokens         2 {'#' * 20}",
        "  up to         8 tokens         0",
        f"  up to        16 tokens         4 {'#' * 40}",
        "  up to        32 tokens         0",
        f"  up to        64 tokens         1 {'#' * 10}",
    ]
