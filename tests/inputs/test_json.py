"""JSON files as people and tools leave them: every reader refuses the same ones."""

import json
import os

import pytest

from sparselong.errors import StageError
from sparselong.files import read_json
from sparselong.health import sources
from sparselong.run import read_manifest
from sparselong.tiny.build import read_record

DAMAGED = {
    "empty": b"",
    "cut": b'{"a": ',
    "a list": b"[]",
    "null": b"null",
    "a key twice": b'{"a": 1, "b": {"c": 1, "c": 2}}',
    "not UTF-8": b'{"a": "\xff"}',
    "nested too deeply": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_explained(tmp_path, kind):
    path = tmp_path / "01_health/manifest.json"
    path.parent.mkdir()
    path.write_bytes(DAMAGED[kind])
    for read in (lambda: read_json(path, "fix it"), lambda: read_manifest(tmp_path, "01_health")):
        with pytest.raises(StageError) as failure:
            read()
        assert str(path) in failure.value.what and failure.value.found.strip()


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_explained(tmp_path, make):
    make(tmp_path / "config.json")
    with pytest.raises(StageError, match="a directory|not a regular file"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_note_of_the_small_model_counts_as_none(tmp_path, kind):
    (tmp_path / "tiny.json").write_bytes(DAMAGED[kind])
    assert read_record(tmp_path) is None


@pytest.mark.parametrize("content", [*DAMAGED.values(), b"{}", b'{"config": 1}'])
def test_damaged_rows_of_a_run_are_not_taken_for_prepared_ones(tmp_path, content):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/source.json").write_bytes(content)
    assert not sources._is_prepared("somebody/rows", tmp_path)


def test_an_incomplete_snapshot_is_not_a_checkpoint(tmp_path):
    from sparselong.checkpoint import missing_files

    assert missing_files(tmp_path) == ["config.json", "tokenizer.json", "model.safetensors"]
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("config.json", "tokenizer.json", "model-2.safetensors"):
        (tmp_path / name).touch()
    assert missing_files(tmp_path) == ["model-1.safetensors"]
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert missing_files(tmp_path) == []
