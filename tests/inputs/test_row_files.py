"""Files of rows as editors, archivers and other programs leave them: right or explained."""

import gzip
import json
import os

import pytest

from sparselong.config import load
from sparselong.data import conversations
from sparselong.errors import StageError
from tests.conftest import ROOT

ROW = {"messages": [{"role": "user", "content": "Größe?"}, {"role": "assistant", "content": "1"}]}
LINE = json.dumps(ROW, ensure_ascii=False)


def texts(path):
    return [[message["content"] for message in row["messages"]] for row in conversations.read(path)]


@pytest.mark.parametrize(
    "content",
    [
        f"{LINE}\n{LINE}\n".encode(),
        f"{LINE}\n{LINE}".encode(),
        f"{LINE}\r\n{LINE}\r\n".encode(),
        f"{LINE}\r{LINE}\r".encode(),
        f"{LINE}\n{LINE}\n".encode("utf-8-sig"),
        f"{LINE}\n\ufeff{LINE}\n".encode(),
        f"\n  \n{LINE}\n\n{LINE}\n \t\n".encode(),
    ],
    ids=["plain", "no newline", "CRLF", "CR", "byte order mark", "concatenated", "blank lines"],
)
def test_lines_are_read_as_they_are_meant(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert texts(path) == [["Größe?", "1"]] * 2


@pytest.mark.parametrize("text", ["a\u2028b\u2029c\x85d", "2024-01-31", "a\x00b", "\ufeff", "😀"])
def test_texts_are_not_changed(data, text):
    row = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}]}
    path = data([])
    path.write_text(f"{json.dumps(row, ensure_ascii=False)}\n{json.dumps(row)}\n", "utf-8")
    assert texts(path) == [[text, "x"]] * 2


@pytest.mark.parametrize(
    ("content", "place", "found"),
    [
        (b"\xff\xfe" + LINE.encode("utf-16-le"), "rows.jsonl", "UTF-16"),
        (LINE.encode("utf-16-le"), "rows.jsonl", "UTF-16"),
        (gzip.compress(LINE.encode()), "rows.jsonl", "gzip"),
        (b"PAR1\x15\x04", "rows.jsonl", "Parquet"),
        (b"PK\x03\x04", "rows.jsonl", "zip"),
        (b"version https://git-lfs.github.com/spec/v1\n", "rows.jsonl", "Git LFS pointer"),
        (f"{LINE}\n\n[{LINE}]\n".encode(), "line 3", "list instead of an object"),
        (f"[\n{LINE}\n]\n".encode(), "line 1", "'['"),
        (f"{LINE}\n".encode() + b"\0" * 20, "line 2", "NUL bytes"),
        (f"{LINE}\n".encode() * 5000 + b'{"messages": "\xe4"}\n', "line 5001", "0xe4 at column 15"),
        (f"{LINE}\n".encode() + b"[" * 100_000 + b"]" * 100_000, "line 2", "nested too deeply"),
        (f'{LINE}\n{{"a": {"1" * 5000}}}\n'.encode(), "line 2", "4300 digits"),
        (
            f'{LINE}\n{{"messages": [], "messages": []}}\n'.encode(),
            "line 2",
            "'messages' occurs tw",
        ),
        (f"{LINE}\n{LINE}{LINE}\n".encode(), "line 2", "Extra data"),
        (f"{LINE}\n{LINE[:-3]}\n".encode(), "line 2", "at column"),
        (b"\n\n", "rows.jsonl is empty", "blank lines: 2"),
        (b"\xef\xbb\xbf", "rows.jsonl is empty", "blank lines: 1"),
        (b"prompt,answer\n1,2\n", "line 1", "'prompt,answer'"),
    ],
)
def test_a_file_that_cannot_be_read_is_explained(tmp_path, content, place, found):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(StageError) as raised:
        conversations.read(path)
    assert place in raised.value.what and found in raised.value.found
    assert "\n" not in raised.value.found


def make_directory(path):
    path.mkdir()


def make_pipe(path):
    os.mkfifo(path)


def make_dead_link(path):
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [make_directory, make_pipe, make_dead_link])
def test_what_is_no_file_is_explained(tmp_path, make):
    make(tmp_path / "rows.jsonl")
    config = load(str(ROOT / "configs/tiny.yaml"), [f"data.train={tmp_path}/rows.jsonl"])
    with pytest.raises(StageError, match=r"rows\.jsonl cannot be read"):
        conversations.prepare(config, tmp_path / "run")


def test_blank_lines_are_recorded_with_their_count(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{LINE}\n\n\n{LINE}\n", encoding="utf-8")
    config = load(str(ROOT / "configs/tiny.yaml"), [f"data.train={path}"])
    for _ in range(2):  # a later stage finds the files prepared
        conversations.prepare(config, tmp_path / "run")
        said = conversations.read_remarks(tmp_path / "run")
        assert said[0] == f"{path}: blank lines skipped: 2"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"config": 1, "sources": 2, "files": 3}'])
def test_a_damaged_record_is_explained(data, tmp_path, content):
    config = load(str(ROOT / "configs/tiny.yaml"), [f"data.train={data([ROW] * 3)}"])
    conversations.prepare(config, tmp_path / "run")
    (tmp_path / "run/data/source.json").write_text(content)
    with pytest.raises(StageError, match=r"source\.json is damaged"):
        conversations.prepare(config, tmp_path / "run")


def test_lines_of_an_earlier_version_are_written_again(data, tmp_path):
    path = data([ROW] * 3)
    config = load(str(ROOT / "configs/tiny.yaml"), [f"data.train={path}"])
    files = conversations.prepare(config, tmp_path / "run")
    record = tmp_path / "run/data/source.json"
    kept = json.loads(record.read_text())
    record.write_text(json.dumps({key: kept[key] for key in kept if key != "format"}))
    stamp = files.train.stat().st_mtime_ns
    assert conversations.prepare(config, tmp_path / "run").train.stat().st_mtime_ns > stamp
    again = json.loads(record.read_text())
    for row in (*kept["files"], *again["files"]):
        del row["mtime_ns"]  # the lines were written again
    assert again == kept
