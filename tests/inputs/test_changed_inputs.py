"""Finished stages whose inputs were changed afterwards, under the same names.

Their figures are no longer those of what the config names, so they are not up to date.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

from sparselong import provenance
from sparselong.config import load
from sparselong.data import conversations
from sparselong.run import Stage
from sparselong.run.directory import finish, prepare
from tests.conftest import load_script, write_rows
from tests.inputs.conftest import QUICK

STAGES = ("02_compress", "03_finetune", "04_eval")
SHARD = "model-00001-of-00004.safetensors"


def chat(*answers: str) -> list:
    question = {"role": "user", "content": "Count."}
    return [
        {"messages": [question, {"role": "assistant", "content": text * 10}]} for text in answers
    ]


@pytest.fixture(scope="module")
def finished(untrained_base, small_arguments, tmp_path_factory) -> Path:
    """A finished stage 02, and stand-ins for stages 03 and 04 that are recorded as theirs are."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(untrained_base, folder / "base")
    write_rows(folder / "train.jsonl", chat("one two ", "three four ", "five six "))
    write_rows(folder / "validation.jsonl", chat("seven "))
    run_dir = folder / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        arguments = arguments_of(small_arguments)
        assert load_script("02_compress").main([*arguments, "--run-dir", "run"]) == 0
        config = load(arguments[1], arguments[2:])
        data = conversations.prepare(config, run_dir)
        for name in STAGES[1:]:
            stage = Stage(name, config, run_dir)
            assert not prepare(stage, redo=False)
            stage.inputs = [*data, run_dir / "02_compress/model"]
            if name == "03_finetune":
                shutil.copytree(run_dir / "02_compress/model", stage.dir / "model")
                stage.inputs.append(run_dir / "02_compress/masters")
                stage.outputs = [stage.dir / "model"]
            else:
                stage.inputs.append(run_dir / "03_finetune/model")
            finish(stage, 1.0)
    return folder


def arguments_of(small_arguments) -> list[str]:
    """Arguments with relative paths, which depend on the current directory."""
    named = ("data.train=train.jsonl", "data.validation=validation.jsonl", "model.base=base")
    return [*small_arguments, *QUICK, *named]


@pytest.fixture
def here(finished, tmp_path, monkeypatch) -> Path:
    """A copy of everything, with the files' times, as the current directory."""
    shutil.copytree(finished, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def call(here, small_arguments, run_script):
    return lambda name, *more: run_script(
        name, *arguments_of(small_arguments)[2:], *more, run_dir=here / "run"
    )


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\n")


def flip(path: Path) -> None:
    """Change a byte at a file's end, and its time, but not its size."""
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


CHANGES = {
    "train.jsonl": (append, STAGES),
    "validation.jsonl": (append, STAGES),
    "run/data/train.jsonl": (append, STAGES),
    f"base/{SHARD}": (flip, STAGES),
    "base/config.json": (append, STAGES),
    "base/tokenizer.json": (append, STAGES),
    f"run/02_compress/model/{SHARD}": (flip, STAGES[1:]),
    "run/02_compress/masters/layer-00001.safetensors": (flip, STAGES[1:]),
    f"run/03_finetune/model/{SHARD}": (flip, STAGES[2:]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_finished_stage_is_not_up_to_date_once_an_input_has_changed(here, call, name):
    change, stages = CHANGES[name]
    change(here / name)
    recorder = "03_finetune" if "03" in name else "02_compress"
    for stage in STAGES:
        for more in ((), ("--dry-run",)):
            outcome = call(stage, *more)
            if stage not in stages:
                assert outcome.code == 0, outcome.err
                continue
            what = f"{here / name} has changed since {recorder} recorded it"
            if "data/" in name:
                what = f"{here / name} has changed since"
            outcome.assert_explained(what, f"python {recorder}.py --config")
            assert outcome.code == 1 and not outcome.out


def test_unchanged_inputs_are_not_read(here, call, monkeypatch):
    """A base of 65 GB takes minutes to read."""
    monkeypatch.setattr(provenance, "hash_file", lambda path: pytest.fail(f"{path} is read"))
    for stage in STAGES:
        outcome = call(stage)
        assert outcome.code == 0 and "is up to date" in outcome.err, outcome.err


def test_touched_moved_and_deleted_inputs_are_allowed(here, call):
    for path in (here / "base").iterdir():
        os.utime(path, ns=(1, 1))
    os.utime(here / "train.jsonl", ns=(1, 1))
    for stage in STAGES:
        assert "is up to date" in call(stage).err
    shutil.rmtree(here / "run/02_compress/masters")
    (here / "validation.jsonl").unlink()
    for stage in STAGES:
        assert "is up to date" in call(stage).err
    (here / "base" / SHARD).unlink()
    for stage in STAGES:
        assert "is up to date" in call(stage).err
    shutil.rmtree(here / "base")
    assert "is up to date" in call("04_eval").err


def test_another_directory_of_the_same_name_is_another_base(here, call, monkeypatch, tmp_path):
    """The config's hash covers the name; which file it is depends on the current directory."""
    for name, words in (("base", SHARD), ("train.jsonl", "train.jsonl")):
        other = tmp_path / f"other-{name}"
        shutil.copytree(here, other, symlinks=True, ignore=shutil.ignore_patterns("run"))
        change = append if name == "train.jsonl" else lambda path: flip(path / SHARD)
        change(other / name)
        monkeypatch.chdir(other)
        for stage in STAGES:
            call(stage).assert_explained(words, "02_compress recorded it")


def test_a_source_that_changed_is_noticed_without_the_prepared_rows(here, call):
    shutil.rmtree(here / "run/data")
    for stage in STAGES:
        assert "is up to date" in call(stage).err
    append(here / "train.jsonl")
    for stage in STAGES:
        call(stage).assert_explained("train.jsonl has changed since 02_compress", "--force")


def test_03_does_not_begin_with_a_base_that_04_would_refuse(here, call):
    shutil.rmtree(here / "run/03_finetune")
    flip(here / "base" / SHARD)
    call("03_finetune").assert_explained(SHARD, "02_compress recorded it", "02_compress.py --conf")
    assert not (here / "run/03_finetune").exists()


def test_force_uses_the_rows_of_a_changed_source(here, call):
    """As the messages say: without deleting anything first."""
    write_rows(here / "train.jsonl", chat("eight ", "nine ", "twelve "))
    outcome = call("02_compress", "--force")
    assert outcome.code == 0, outcome.err
    assert "twelve" in (here / "run/data/train.jsonl").read_text()
    assert "is up to date" in call("02_compress").err
    manifest = json.loads((here / "run/02_compress/manifest.json").read_text())
    assert set(manifest["sources"]) == {"data.train", "data.validation"}
    call("03_finetune").assert_explained("03_finetune.py --config")


def test_force_does_not_replace_prepared_rows_that_a_person_edited(here, call):
    append(here / "run/data/train.jsonl")
    append(here / "train.jsonl")
    edited = (here / "run/data/train.jsonl").read_bytes()
    call("02_compress", "--force").assert_explained("data/train.jsonl has changed", "delete ")
    assert (here / "run/data/train.jsonl").read_bytes() == edited
