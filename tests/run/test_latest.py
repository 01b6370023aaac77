"""Links to finished models: named by profile and time, and `latest`."""

import os
import re

import pytest

from sparselong.config import load
from sparselong.run import Stage, run_stage
from sparselong.run.latest import models_folder, name_model
from tests.conftest import ROOT

TINY = str(ROOT / "configs/tiny.yaml")


def stage_of(run_dir, *overrides: str) -> Stage:
    stage = Stage("03_finetune", load(TINY, list(overrides)), run_dir)
    (stage.dir / "model").mkdir(parents=True, exist_ok=True)
    return stage


@pytest.fixture
def times(monkeypatch) -> list[str]:
    given = ["20260131-235959", "20260201-000000", "20260202-000000"]
    monkeypatch.setattr("sparselong.run.latest.time.strftime", lambda form: given.pop(0))
    return given


def links(folder) -> dict[str, str]:
    return {path.name: os.readlink(path) for path in folder.iterdir()}


def test_links_are_beside_runs(tmp_path, times):
    first = stage_of(tmp_path / "runs/a", "profile=quick_test")
    name_model(first)
    name_model(stage_of(tmp_path / "runs/b"))
    assert links(tmp_path / "models") == {
        "a-quick_test-20260131-235959": "../runs/a/03_finetune/model",
        "b-standard-20260201-000000": "../runs/b/03_finetune/model",
        "latest": "../runs/b/03_finetune/model",
    }
    name_model(first)  # redone: its old name would be another model's
    assert links(tmp_path / "models") == {
        "a-quick_test-20260202-000000": "../runs/a/03_finetune/model",
        "b-standard-20260201-000000": "../runs/b/03_finetune/model",
        "latest": "../runs/a/03_finetune/model",
    }
    assert (tmp_path / "models/latest").resolve() == first.dir / "model"


def test_other_run_directories_have_them_beside_themselves(tmp_path, monkeypatch):
    assert models_folder(tmp_path / "x") == tmp_path / "models"
    monkeypatch.chdir(tmp_path)
    assert models_folder(stage_of(tmp_path).run_dir.relative_to(tmp_path) / "runs/a") == (
        tmp_path / "models"
    )


def test_a_persons_files_are_left_alone(tmp_path, capsys):
    (tmp_path / "models/latest").mkdir(parents=True)
    (tmp_path / "models/mine").symlink_to("elsewhere")
    name_model(stage_of(tmp_path / "a"))
    assert (tmp_path / "models/latest").is_dir() and not (tmp_path / "models/latest").is_symlink()
    assert os.readlink(tmp_path / "models/mine") == "elsewhere"
    assert "latest is not made a link" in capsys.readouterr().err


def test_where_no_folder_can_be_made_that_is_told_and_nothing_more(tmp_path, capsys):
    (tmp_path / "models").write_text("a file")
    name_model(stage_of(tmp_path / "a"))
    assert "models has no link to the model: File exists" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["02_compress", "03_finetune"])
def test_only_a_finished_stage_03_is_linked_and_only_after_its_manifest(tmp_path, name, capsys):
    run_dir, seen = tmp_path / "run", []

    def execute(stage: Stage) -> None:
        seen.append((tmp_path / "models").exists())
        if len(seen) == 1:
            raise KeyboardInterrupt

    arguments = ["--config", TINY, "--run-dir", str(run_dir)]
    if name == "03_finetune":  # what it reads
        assert run_stage("02_compress", "", arguments, lambda stage: None, lambda *_: {}, str) == 0
    for code in (1, 0):
        assert run_stage(name, "", arguments, execute, lambda c, r, n: {}, str) == code
    assert seen == [False, False]
    assert (tmp_path / "models").exists() is (name == "03_finetune")
    if name == "03_finetune":
        names = sorted(links(tmp_path / "models"))
        assert names[0] == "latest" and re.fullmatch(r"run-\w+-\d{8}-\d{6}", names[1])
