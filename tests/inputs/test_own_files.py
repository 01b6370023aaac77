"""Files that stages write for themselves, damaged between two runs: used, redone or explained."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparselong.checkpoint import missing_files
from sparselong.config.schema import load
from sparselong.data import conversations
from sparselong.errors import ConfigError, StageError
from sparselong.evaluate import models
from sparselong.evaluate.work import Mark
from sparselong.files import why_unusable
from sparselong.finetune import trainer
from sparselong.health.sources import probe_sources
from sparselong.memory import check_model, find_shape
from sparselong.processes.failure import read_failure, write_failure
from sparselong.run import Stage
from sparselong.tiny import resolve_base
from tests.conftest import ROOT

INDEX = "model.safetensors.index.json"
TINY = ROOT / "configs/tiny.yaml"
TASKS = "evaluation.tasks=[demo_hellaswag]"


@pytest.fixture(scope="module")
def compressed(small_arguments, tmp_path_factory) -> Path:
    """A run directory in which stage 02 has compressed all layers and then was interrupted."""
    from tests.conftest import load_script

    run = tmp_path_factory.mktemp("compressed") / "run"
    assert load_script("02_compress").main([*small_arguments, "--run-dir", str(run)]) == 0
    (run / "02_compress/manifest.json").unlink()
    return run


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("base.json", "{"),
        ("base.json", '{"files": [], "seconds": "1"}'),
        ("work/layer-00000.json", "[1]"),
        ("work/model.json", '{"files": [3]}'),
    ],
)
def test_a_damaged_record_of_stage_02_is_explained(compressed, run_script, tmp_path, name, text):
    run = shutil.copytree(compressed, tmp_path / "run", symlinks=True)
    (run / "02_compress" / name).write_text(text)
    short = ("sequence_len=2048", "micro_batch_size=1")  # as in the config of `compressed`
    run_script("02_compress", *short).assert_explained(Path(name).name, "--force")


@pytest.mark.parametrize("text", ["", "[]", "null", '{"bytes": 1}', "[" * 99999])
def test_every_damage_of_a_record_of_stage_02_is_explained(tmp_path, text):
    from sparselong.compress.finished import read_own

    (tmp_path / "base.json").write_text(text)
    with pytest.raises(StageError, match="base.json (is damaged|cannot be read)"):
        read_own(tmp_path / "base.json", "path", "bytes")


@pytest.mark.parametrize("content", [b"", b"xx", b"\x02\0\0\0\0\0\0\0{}"])
def test_damaged_states_of_stage_02_are_explained(tmp_path, content):
    from sparselong.compress.calibration import HiddenStates
    from sparselong.compress.work import Spread

    path = tmp_path / "states.safetensors"
    path.write_bytes(content)
    states = HiddenStates(path, (2, 4, 8), torch.float32, torch.device("cpu"), 4, Spread())
    nothing = SimpleNamespace()
    with pytest.raises(StageError, match=r"(?s)states.*is damaged.*remove .*first layer"):
        states.start(nothing, nothing)  # type: ignore[arg-type]


def test_too_few_calibration_tokens_are_refused_by_01_as_by_02(run_script, tmp_path):
    one, two = (
        run_script(name, "calibration.sequence_len=8192", TASKS)
        for name in ("01_health", "02_compress")
    )
    one.assert_explained("at least 8192 tokens (calibration.sequence_len)", "conversations of")
    assert one.err[one.err.rindex("error: ") :] == two.err[two.err.rindex("error: ") :]
    assert not (tmp_path / "run/02_compress/base.json").exists()  # before the base is hashed


@pytest.mark.parametrize("text", ["{", "[]", '{"config": 3}'])
def test_01_explains_a_damaged_record_of_the_rows(run_script, data, tmp_path, text):
    (tmp_path / "run/data").mkdir(parents=True)
    (tmp_path / "run/data/source.json").write_text(text)
    for name in ("train.jsonl", "validation.jsonl"):
        (tmp_path / "run/data" / name).write_text("{}\n")
    outcome = run_script("01_health", TASKS)
    assert "Traceback" not in outcome.err
    if outcome.code:
        outcome.assert_explained("source.json")


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"weight_map": {"a": 1, "b": "x"}}', '{"weight_map": {"a": ["x"]}}']
)
def test_a_damaged_index_of_a_hub_cache_is_left_to_the_opening(untrained_base, tmp_path, text):
    shutil.copytree(untrained_base, tmp_path / "base")
    (tmp_path / "base" / INDEX).write_text(text)
    assert missing_files(tmp_path / "base") == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"fingerprint": "f"}'])
def test_a_damaged_kept_result_is_measured_again(tmp_path, monkeypatch, text):
    def load_again(*args, **kwargs):
        raise InterruptedError

    monkeypatch.setattr(models, "load_model", load_again)
    (tmp_path / "base.json").write_text(text)
    config = load(TINY)
    measurements = SimpleNamespace(suite=SimpleNamespace(config=config))
    told = []
    with pytest.raises(InterruptedError):
        mark = Mark("base", str(tmp_path), "f", True)
        models.measure(mark, measurements, SimpleNamespace(dir=tmp_path, log=told.append))  # type: ignore[arg-type]
    assert "base.json is damaged, so the model is measured again" in told[0]


def test_a_baked_record_without_its_figures_is_explained(tmp_path, monkeypatch):
    stage = Stage("03_finetune", load(TINY), tmp_path)
    stage.dir.mkdir()
    (stage.dir / "baked.json").write_text(json.dumps({"best_step": 2}))
    monkeypatch.setattr(trainer, "check_receipt", lambda stage, asked: {})
    with pytest.raises(StageError, match=r"(?s)baked.json is damaged.*no best_checkpoint"):
        trainer._publish(stage)


# Paths that lead nowhere, or where this user may not look


@pytest.fixture
def closed(monkeypatch, tmp_path) -> Path:
    """A folder that this user cannot search, even if the user is root."""
    folder, look = tmp_path / "closed", os.stat

    def stat(path, *args, **kwargs):
        if not isinstance(path, int) and os.fspath(path).startswith(f"{folder}/"):
            raise PermissionError(13, "Permission denied", str(path))
        return look(path, *args, **kwargs)

    folder.mkdir()
    monkeypatch.setattr(os, "stat", stat)
    return folder


@pytest.mark.parametrize("name", ["01_health", "02_compress"])
@pytest.mark.parametrize("key", ["model.base", "data.train"])
def test_what_cannot_be_looked_at_is_named(run_script, closed, tmp_path, name, key):
    outcome = run_script(name, f"{key}={closed / 'inside'}", TASKS)
    outcome.assert_explained("Permission denied")
    assert "run cannot be" not in outcome.err  # the run directory is not to blame


def test_the_reason_is_that_of_the_system(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    reasons = {
        "file": "a file",
        ".": "a directory",
        "none": "no such directory",
        "file/x": "Not a directory",
        "loop": "Too many levels of symbolic links",
    }
    for name, reason in reasons.items():
        assert why_unusable(tmp_path / name, "directory") == reason
        if name != ".":
            config = load(TINY, [f"model.base={tmp_path / name}"])
            with pytest.raises(StageError) as caught:
                resolve_base(config, tmp_path, print)
            assert caught.value.found == reason
            assert probe_sources(config, tmp_path)[0].detail == reason


def test_a_directory_named_as_a_published_model_is_what_counts(
    untrained_base, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(untrained_base, "openai/gpt-oss-20b")
    config = load(TINY, ["model.base=openai/gpt-oss-20b"])
    assert find_shape(config.model).hidden == 128
    path = tmp_path / "openai/gpt-oss-20b/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 64}))
    with pytest.raises(ConfigError, match="sequence_len is longer than"):
        check_model(config)


@pytest.mark.parametrize("name", ["train.jsonl", "validation.jsonl"])
@pytest.mark.parametrize("text", ["", "notes\n", '{"messages": [], "origin": "me"}\n'])
def test_a_persons_file_in_the_data_folder_is_not_replaced(chat_file, tmp_path, name, text):
    """The run directory may be a project's folder, with a `data` of its own beside a stage's."""
    config = load(TINY, [f"data.train={chat_file}"])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_text(text)
    with pytest.raises(StageError, match="would be replaced"):
        conversations.prepare(config, tmp_path)
    assert (tmp_path / "data" / name).read_text() == text
    (tmp_path / "data" / name).unlink()
    made = conversations.prepare(config, tmp_path)
    (tmp_path / "data/source.json").unlink()  # as a kill leaves them
    assert conversations.prepare(config, tmp_path) == made


@pytest.mark.parametrize(
    "text", ["[]", "3", "null", "{}", '{"what": "a"}', '{"what": 1, "expected": 2}', '["what"]']
)
def test_a_failure_record_of_another_shape_is_none_of_the_trainers(tmp_path, text):
    """The trainer's end is then told by its last lines."""
    (tmp_path / "failure.json").write_text(text)
    assert read_failure(tmp_path) is None


def test_what_a_trainer_wrote_is_read_back(tmp_path):
    write_failure(tmp_path, 0, StageError("a", "b", "c", "d", consequence=True))
    failure = read_failure(tmp_path)
    assert failure is not None and failure.consequence
    assert failure.explanation() == {"what": "a", "expected": "b", "found": "c", "fix": "d"}


def test_01_removes_what_a_killed_01_left(run_script, tmp_path):
    run = tmp_path / "run"
    (run / "01_health").mkdir(parents=True)
    (run / ".health-ab3_xy9z/data").mkdir(parents=True)
    (run / ".health-ab3_xy9z/data/train.jsonl").write_text("{}")
    (run / ".health-notes").mkdir()  # a person's
    (run / ".health-ab3_xy9y").write_text("a person's")
    run_script("01_health", TASKS)
    left = {path.name for path in run.iterdir() if path.name.startswith(".health-")}
    assert left == {".health-notes", ".health-ab3_xy9y"}


def test_rows_are_read_again_only_if_they_were_refused(base, run_script, tmp_path):
    """A damaged base says nothing about the rows that other stages may have used."""
    record = tmp_path / "run/data/source.json"
    more = (f"model.base={base}", "calibration.sequence_len=8192")  # too few tokens for that
    shard = base / "model-00001-of-00004.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    run_script("02_compress", *more).assert_explained(shard.name)
    assert record.exists()
    shard.write_bytes(whole)
    run_script("02_compress", *more).assert_explained("calibration.sequence_len")
    assert not record.exists()
