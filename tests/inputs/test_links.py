"""Links are conveniences: where a file system has none, files are copied and the stages go on."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from sparselong.checkpoint import Checkpoint, derive, write_tensors
from sparselong.files import point_to
from sparselong.finetune import trainer
from sparselong.run import Stage

NAME = "model.norm.weight"
REFUSALS = (
    *("EPERM", "EXDEV", "EOPNOTSUPP", "EMLINK", "EACCES", "ENOSYS", "EINVAL", "EIO", "EROFS"),
    *("ENOTSUP", "ENAMETOOLONG", "EBUSY"),
)


def refuse(code: str):
    """Return a function that fails as a file system does."""

    def link(*_arguments, **_keywords):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    return link


def make(base: Path, target: Path) -> Checkpoint:
    source = Checkpoint(base)
    target.mkdir()
    write_tensors(target / "new.safetensors", {NAME: source.read([NAME])[NAME] * 2})
    return derive(source, target, {NAME}, [target / "new.safetensors"], {})


@pytest.mark.parametrize("code", REFUSALS)
def test_a_shard_that_cannot_be_linked_is_copied(untrained_base, tmp_path, monkeypatch, code):
    monkeypatch.setattr(os, "link", refuse(code))
    made = make(untrained_base, tmp_path / "made")
    assert all((made.directory / file).stat().st_nlink == 1 for file in made.files)
    source = Checkpoint(untrained_base)
    names = set(source.tensors) - {NAME}
    copied = made.read(names)
    assert all(torch.equal(copied[n], t) for n, t in source.read(names).items())


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT"])
def test_a_full_disk_is_no_reason_to_copy(untrained_base, tmp_path, monkeypatch, code):
    monkeypatch.setattr(os, "link", refuse(code))
    with pytest.raises(OSError, match=os.strerror(getattr(errno, code))):
        make(untrained_base, tmp_path / "made")


def test_a_link_that_cannot_be_made_is_told_in_one_line(tmp_path, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(os, "symlink", refuse("EPERM"))
    for _ in range(2):
        point_to(tmp_path / "best", "checkpoints/checkpoint-2", told.append)
    assert len(told) == 2 and "Operation not permitted" in told[0] and "\n" not in told[0]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_lies_in_a_links_place_is_left_alone(tmp_path, kind):
    place, told = tmp_path / "best", []
    if kind == "folder":
        place.mkdir()
    (place / "notes.txt" if kind == "folder" else place).write_text("mine")
    point_to(place, "checkpoints/checkpoint-2", told.append)
    assert (place / "notes.txt" if kind == "folder" else place).read_text() == "mine"
    assert len(told) == 1 and "File exists" in told[0]


@pytest.mark.parametrize("older", ["checkpoints/checkpoint-1", "gone"])
def test_an_older_link_is_replaced(tmp_path, older):
    (tmp_path / "checkpoints/checkpoint-1").mkdir(parents=True)
    (tmp_path / "best").symlink_to(older)
    told: list[str] = []
    point_to(tmp_path / "best", "checkpoints/checkpoint-2", told.append)
    assert os.readlink(tmp_path / "best") == "checkpoints/checkpoint-2" and not told


@pytest.mark.parametrize("obstacle", ["no links", "a file", "a folder"])
def test_stage_02_ends_well_without_its_named_link(run_script, tmp_path, monkeypatch, obstacle):
    place = tmp_path / "run/02_compress/base-w4a16-experts-4bit-2of4"
    if obstacle == "no links":
        monkeypatch.setattr(os, "symlink", refuse("EOPNOTSUPP"))
    else:  # somebody's own, put there before the stage was done
        assert run_script("02_compress").code == 0
        (place.parent / "manifest.json").unlink()
        place.unlink()
        place.mkdir() if obstacle == "a folder" else place.write_text("mine")
    outcome = run_script("02_compress")
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("is not made a link") == 1
    assert run_script("02_compress").code == 0
    assert place.is_symlink() is False and place.exists() is (obstacle != "no links")


@pytest.mark.parametrize("obstacle", ["no links", "a folder"])
def test_stage_03_ends_well_without_the_link_to_the_best(tmp_path, monkeypatch, obstacle):
    stage = Stage("03_finetune", None, tmp_path)  # type: ignore[arg-type]
    stage.dir.mkdir()
    figures = ("mask_updates", "best_step", "steps", "best_eval_loss", "two_four_conforming")
    baked = dict.fromkeys(figures, 1) | {"best_checkpoint": "checkpoint-2"}
    baked |= {"peak_bytes": {"host": 1}, "files": []}
    (stage.dir / "baked.json").write_text(json.dumps(baked))
    row = {"step": 1, "loss": 1.0, "tokens": 1, "tokens_per_second": 1.0}
    (stage.dir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    keys = ("keep_attention", "keep_experts", "trainable_parameters", "supervised_token_fraction")
    monkeypatch.setattr(trainer, "check_receipt", lambda *_: dict.fromkeys(keys, 1))
    monkeypatch.setattr(trainer.plot, "draw", lambda *_: None)
    if obstacle == "no links":
        monkeypatch.setattr(os, "symlink", refuse("EPERM"))
    else:
        (stage.dir / "best").mkdir()
    for _ in range(2):
        trainer._publish(stage)
    assert (stage.dir / "log.txt").read_text().count("is not made a link") == 2
    assert stage.metrics["best_step"] == 1
