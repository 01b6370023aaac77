"""--force and people's files: what a stage did not write is kept."""

import json
import os
import shutil
from pathlib import Path

import pytest

from sparselong import provenance
from sparselong.config import load
from sparselong.evaluate.work import WORK, scores_path
from sparselong.finetune import checkpoints
from sparselong.processes import machines
from sparselong.processes.failure import failure_path
from sparselong.run import Stage
from sparselong.run.directory import finish, prepare
from sparselong.run.own_files import has_begun, remove_own
from tests.conftest import ROOT

TINY = ROOT / "configs/tiny.yaml"
CHECKPOINT = (
    *("README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"),
    *("masks.safetensors", "optimizer.pt", "progress.json", "rng_state.pth", "scheduler.pt"),
    *("tokenizer.json", "tokenizer_config.json", "tokens_state.json", "training_args.bin"),
)
OURS = (
    *("axolotl.yaml", "supervision.txt", "metrics.jsonl", "receipt.json", "baked.json"),
    *("trained.json", "loss.png", "log.rank1.txt", "failure.json", "axolotl/debug.log"),
    *("axolotl/config.json", "adapter/adapter_model.safetensors", "adapter/README.md"),
    *("model/model-00001-of-00004.safetensors", "model/tuned-00000.safetensors"),
    *("model/model.safetensors.index.json", "model/config.json", "model/tokenizer.json"),
    *("model.partial/tuned-00001.safetensors", "checkpoints/.unfinished/checkpoint-6/optimizer.pt"),
)
THEIRS = (
    *("notes.txt", "metrics (copy).jsonl", "model/notes.md", "model/model-old.safetensors"),
    *("checkpoints/checkpoint-keep-2/adapter_model.safetensors", "checkpoints/notes.txt"),
    *("checkpoints/checkpoint-2/loss.xlsx", "checkpoints/checkpoint-2.bak/optimizer.pt"),
)


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text or path.name)


def write_checkpoint(path: Path, step: int) -> None:
    for name in CHECKPOINT:
        write(path / name)
    write(path / "trainer_state.json", json.dumps({"global_step": step}))
    checkpoints.seal(path)


@pytest.fixture
def stage(tmp_path) -> Stage:
    """A stage 03 with the files of an interrupted training, and a person's."""
    manifest = {"stage": "02_compress", "status": "done", "inputs": [], "outputs": []}
    manifest |= {"format_version": 3, "seconds": 1.0, "metrics": {}}
    stage = Stage("03_finetune", load(TINY), tmp_path / "run")
    from sparselong.run.stages import stage_hash

    manifest["config_hash"] = stage_hash(stage.config, "02_compress")
    write(stage.run_dir / "02_compress/manifest.json", json.dumps(manifest))
    assert not prepare(stage, redo=False)
    for name in OURS:
        write(stage.dir / name)
    for step in (2, 4):
        write_checkpoint(stage.dir / f"checkpoints/checkpoint-{step}", step)
    (stage.dir / "best").symlink_to("checkpoints/checkpoint-2")
    return stage


def add_theirs(stage: Stage) -> dict[str, str]:
    """Write a person's files, and return all that must be kept, with its content."""
    for name in THEIRS:
        write(stage.dir / name)
    copied = stage.dir / "checkpoints/checkpoint-7"
    shutil.copytree(stage.dir / "checkpoints/checkpoint-2", copied)
    (copied / "loss.xlsx").unlink()
    write(stage.dir / "checkpoints/checkpoint-4/README.md", "what I found")
    names = [*THEIRS, "checkpoints/checkpoint-4/README.md"]
    names += [f"checkpoints/checkpoint-7/{path.name}" for path in copied.iterdir()]
    return {name: (stage.dir / name).read_text() for name in names}


def contents(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}


def test_forcing_unfinished_work_keeps_what_the_stage_did_not_write(stage, capsys):
    theirs = add_theirs(stage)
    assert not prepare(stage, redo=True)
    kept = stage.run_dir / "03_finetune.kept-1"
    assert contents(kept) == theirs
    assert set(contents(stage.dir)) == {"started.json", "log.txt"}
    told = capsys.readouterr().err
    assert told.count("did not write") == 1
    assert f"kept in {kept}: {len(theirs)} files that 03_finetune did not write: " in told


def test_a_finished_redo_keeps_what_the_stage_did_not_write(stage, capsys):
    stage.outputs = [stage.dir / "model", stage.dir / "adapter", stage.dir / "loss.png"]
    finish(stage, 1.0)
    theirs = add_theirs(stage)
    write(stage.dir / "loss.png", "with my arrows")
    theirs["loss.png"] = "with my arrows"
    assert not prepare(stage, redo=True)
    assert set(theirs) <= set(contents(stage.replaced_dir))
    finish(stage, 1.0)
    assert not stage.replaced_dir.exists()
    assert contents(stage.run_dir / "03_finetune.kept-1") == theirs
    assert "files that 03_finetune did not write" in capsys.readouterr().err
    write(stage.dir / "again.txt")
    assert not prepare(stage, redo=True)
    finish(stage, 1.0)
    assert contents(stage.run_dir / "03_finetune.kept-2") == {"again.txt": "again.txt"}


@pytest.mark.parametrize("done", [True, False])
def test_nothing_of_a_stages_own_is_kept(stage, capsys, done):
    if done:
        stage.outputs = [stage.dir / "model"]
        finish(stage, 1.0)
    assert not prepare(stage, redo=True)
    finish(stage, 1.0)
    names = {path.name for path in stage.run_dir.iterdir()}
    assert names == {"02_compress", "03_finetune", "config.yaml"}
    assert "kept" not in capsys.readouterr().err


@pytest.mark.parametrize("stage_name", ["02_compress", "03_finetune", "04_eval"])
def test_what_stages_leave_for_their_processes_is_their_own(tmp_path, stage_name):
    paths = [failure_path(tmp_path, rank) for rank in (0, 1, 12)]
    paths += [tmp_path / "log.rank1.txt", tmp_path / machines.FILE]
    if stage_name == "04_eval":
        paths += [scores_path(tmp_path, name) for name in ("base", "compressed", "finetuned")]
        paths += [tmp_path / WORK, tmp_path / f"{WORK}.partial"]
    for path in paths:
        write(path)
    assert remove_own(tmp_path, stage_name) == []


def test_event_files_are_the_stages_own_and_an_offline_run_is_kept_for_its_upload(tmp_path):
    folder = "wandb/offline-run-20260131_235959-abc"
    offline = [f"{folder}/logs/debug.log", f"{folder}/run-abc.wandb"]
    for name in ("tensorboard/events.out.tfevents.1769903999.host.1.0", *offline):
        write(tmp_path / name)
    (tmp_path / "wandb/latest-run").symlink_to(folder.removeprefix("wandb/"))
    assert not has_begun(tmp_path, "03_finetune"), "the first row of a run is before its first step"
    assert remove_own(tmp_path, "03_finetune") == ["wandb/latest-run", *offline]


def test_links_are_not_followed(stage, tmp_path):
    write(tmp_path / "elsewhere/model.safetensors", "a person's")
    shutil.rmtree(stage.dir / "model")
    (stage.dir / "model").symlink_to(tmp_path / "elsewhere")
    (stage.dir / "newest").symlink_to("checkpoints/checkpoint-4")
    assert remove_own(stage.dir, stage.name) == ["model", "newest"]
    assert contents(tmp_path / "elsewhere") == {"model.safetensors": "a person's"}


def test_a_stage_directory_that_is_a_link_stays_one(stage, tmp_path):
    stage.dir.rename(tmp_path / "disk")
    stage.dir.symlink_to(tmp_path / "disk")
    assert not prepare(stage, redo=True)
    assert stage.dir.is_symlink() and set(os.listdir(tmp_path / "disk")) == {
        *("started.json", "log.txt")
    }


def test_a_failure_to_remove_the_old_result_ends_nothing(stage, monkeypatch, capsys):
    finish(stage, 1.0)
    assert not prepare(stage, redo=True)

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        assert finish(stage, 1.0)["status"] == "done"
    assert "could not be removed: Permission denied" in capsys.readouterr().err


def test_real_stages_leave_nothing_behind_when_they_are_forced(run_script, tmp_path, monkeypatch):
    """Every file that stages 01 and 02 write is known as theirs, finished or not."""
    from sparselong.compress.layers import LayerStream

    original, calls = LayerStream.compress, []

    def stop(*arguments):
        original(*arguments)
        calls.append(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LayerStream, "compress", stop)
        assert run_script("02_compress").code == 1
    assert remove_own(tmp_path / "run/02_compress", "02_compress") == []
    for _ in range(2):
        for name in ("01_health", "02_compress"):
            outcome = run_script(name, *(["--force"] if name == "02_compress" else []))
            assert "kept" not in outcome.err, outcome.err
    assert provenance.hash_file(tmp_path / "run/02_compress/model/config.json")
    assert not list((tmp_path / "run").glob("*.kept-*"))
    (tmp_path / "run/02_compress/manifest.json").unlink()
    assert remove_own(tmp_path / "run/02_compress", "02_compress") == []
