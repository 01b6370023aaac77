"""Checkpoint directories as people, disks and kills leave them: what is read, kept and removed."""

import hashlib
import io
import json
import os
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save
from transformers import Trainer, TrainerState

from sparselong.config.schema import load
from sparselong.errors import StageError
from sparselong.finetune import checkpoints, masked_trainer, trainer
from sparselong.finetune.checkpoints import find_fault, find_last, remove_oldest
from sparselong.finetune.masked_trainer import MaskedTraining
from sparselong.finetune.trainer import find_resumable
from sparselong.finetune.training_run import TrainingRun
from sparselong.processes import TrainerEnded
from sparselong.run import Stage
from tests.conftest import ROOT

ZIPPED = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "rng_state_1.pth")
TENSORS = ("adapter_model.safetensors", "masks.safetensors")
TEXTS = ("adapter_config.json", "progress.json", "tokens_state.json", "trainer_state.json")
FOREIGN = (
    *("checkpoint-keep-2", "checkpoint-2.bak", "checkpoint-2 (copy)", "checkpoint-2~", "best.old"),
    *("checkpoint-", "checkpoint-007", "checkpoint-+8", "checkpoint-8 ", "checkpoint-８", "notes"),
    *("Checkpoint-8", "my-checkpoint-8", "checkpoint-8.0", "checkpoint-1e3", "checkpoint-2-8"),
)


@cache
def sample(name: str) -> bytes:
    """Return a small valid file of a name's format."""
    if name in TENSORS:
        return save({"weight": torch.arange(64.0)})
    file = io.BytesIO()
    torch.save({"values": torch.arange(64.0)}, file)
    return file.getvalue()


def write_files(path: Path, step: int) -> None:
    """Write a checkpoint's files as transformers, PEFT and Axolotl do."""
    path.mkdir(parents=True)
    for name in (*ZIPPED, *TENSORS):
        (path / name).write_bytes(sample(name))
    for name in TEXTS:
        (path / name).write_text(json.dumps({"global_step": step}))
    (path / "README.md").write_text("an adapter")


def make(folder: Path, step: int, sealed: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    write_files(path, step)
    if sealed:
        checkpoints.seal(path)
    return path


def contents(*paths: Path) -> dict[str, str]:
    """Hash of every file, and target of every link, below the paths."""
    found = {}
    for path in [each for top in paths for each in (top, *top.rglob("*"))]:
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        else:
            found[str(path)] = (
                "" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
            )
    return found


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    middle = len(data) // 2
    if how == "missing":
        path.unlink()
    elif how == "a directory":
        path.unlink()
        path.mkdir()
    else:
        flipped = data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]
        path.write_bytes({"empty": b"", "cut": data[:middle], "flipped": flipped}[how])


@pytest.fixture
def stage(tmp_path) -> Stage:
    made = Stage("03_finetune", load(ROOT / "configs/tiny.yaml"), tmp_path)
    (made.dir / "checkpoints").mkdir(parents=True)
    return made


@pytest.fixture
def folder(stage) -> Path:
    return stage.dir / "checkpoints"


def test_only_exact_names_are_read_and_removed(stage, folder):
    for step in (2, 9, 10):
        make(folder, step)
    mine = [shutil.copytree(folder / "checkpoint-2", folder / name) for name in FOREIGN]
    (folder / "checkpoint-2.txt").write_text("my notes")
    (folder / "checkpoint-30").write_text("a file")
    (folder / "checkpoint-40").symlink_to("/somewhere/else")
    mine += [folder / name for name in ("checkpoint-2.txt", "checkpoint-30", "checkpoint-40")]
    before = contents(*mine)
    assert find_resumable(stage, folder) == folder / "checkpoint-10"
    assert remove_oldest(folder, 1, {"checkpoint-10"}) == {}
    assert contents(*mine) == before
    left = {path.name for path in folder.iterdir()}
    assert left == {"checkpoint-10", *(path.name for path in mine)}


@pytest.mark.parametrize("how", ["empty", "cut", "flipped", "missing", "a directory"])
@pytest.mark.parametrize("name", [*ZIPPED, *TENSORS, *TEXTS])
def test_a_damaged_checkpoint_is_passed_over_by_name_and_left(stage, folder, capsys, name, how):
    whole, broken = make(folder, 2), make(folder, 4)
    damage(broken / name, how)
    before = contents(folder)
    assert find_resumable(stage, folder) == whole
    told = capsys.readouterr().err
    assert "passing over checkpoint-4" in told and name in told
    assert contents(folder) == before
    shutil.rmtree(whole)
    assert find_resumable(stage, folder) is None
    assert "no whole checkpoint is left: training starts over" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["empty", "cut", "missing"])
@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", *TENSORS, "trainer_state.json"])
def test_an_earlier_versions_checkpoint_is_used_if_its_files_open(folder, name, how):
    old = make(folder, 2, sealed=False)
    assert find_last(folder) == (old, {})
    damage(old / name, how)
    found, faults = find_last(folder)
    assert found is None and name in faults[old]


def test_a_flipped_bit_in_an_earlier_versions_optimizer_is_found(folder):
    old = make(folder, 2, sealed=False)
    damage(old / "optimizer.pt", "flipped")
    assert "optimizer.pt is damaged" in (find_fault(old) or "")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"files": {}}',
        '{"files": {"a": 1}}',
        '{"files": []}',
        "\xff",
        pytest.param("[" * 100_000, id="nested"),
    ],
)
def test_a_damaged_record_is_a_damaged_checkpoint(folder, text):
    path = make(folder, 2)
    (path / checkpoints.RECORD).write_bytes(text.encode("latin-1"))
    assert checkpoints.RECORD in (find_fault(path) or "")


def test_a_checkpoint_copied_to_another_number_is_none(folder):
    shutil.copytree(make(folder, 4), folder / "checkpoint-6")
    found, faults = find_last(folder)
    assert found == folder / "checkpoint-4"
    assert faults == {folder / "checkpoint-6": "trainer_state.json is of step 4"}


def test_a_copy_under_a_lower_number_is_its_makers(folder):
    newest = make(folder, 4)
    shutil.copytree(newest, folder / "checkpoint-2")
    assert remove_oldest(folder, 1, {"checkpoint-4"}) == {}
    assert (folder / "checkpoint-2").is_dir()


def test_an_edited_description_does_not_matter_to_training(folder):
    path = make(folder, 2)
    (path / "README.md").write_text("my best one so far")
    assert find_fault(path) is None


def test_the_newest_and_the_best_are_kept(folder):
    for step in range(1, 7):
        make(folder, step)
    remove_oldest(folder, 3, {"checkpoint-6", "checkpoint-2"})
    assert sorted(path.name for path in folder.iterdir()) == [
        *("checkpoint-2", "checkpoint-5", "checkpoint-6")
    ]
    remove_oldest(folder, 1, {"checkpoint-6", "checkpoint-2"})
    assert len(list(folder.iterdir())) == 2


CHANGED = (
    "notes.txt",
    "README.md",
    "optimizer.pt",
    "plots/a.png",
    "link",
    "optimizer.pt as a link",
)


@pytest.mark.parametrize("name", CHANGED)
def test_a_checkpoint_that_someone_changed_is_not_removed(folder, name):
    """Neither counted, so that as many others are kept as without it."""
    changed, *_ = (make(folder, step) for step in range(1, 5))
    if name.endswith("link"):
        file = changed / name.removesuffix(" as a link")
        file.unlink(missing_ok=True)
        file.symlink_to("/somewhere/else")
    else:
        (changed / name).parent.mkdir(exist_ok=True)
        (changed / name).write_text("mine")
    before = contents(changed)
    for _ in range(2):
        remove_oldest(folder, 2, {"checkpoint-4"})
        assert contents(changed) == before
    left = {path.name for path in folder.iterdir()}
    assert left == {"checkpoint-1", "checkpoint-3", "checkpoint-4"}


def test_an_earlier_versions_checkpoints_are_not_removed(folder):
    """Without a record, nobody can tell which files in them are a person's."""
    for step in (2, 4):
        make(folder, step, sealed=False)
    make(folder, 6)
    remove_oldest(folder, 1, {"checkpoint-6"})
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("kind", ["damaged", "a file", "a link", "a dead link", "a person's"])
def test_what_stands_in_a_new_checkpoints_place_is_set_aside(folder, kind):
    place = folder / "checkpoint-4"
    if kind == "damaged":
        damage(make(folder, 4) / "optimizer.pt", "cut")
    elif kind == "a file":
        place.write_text("mine")
    elif kind == "a person's":
        place.mkdir()
        (place / "notes.txt").write_text("mine")
    else:
        target = make(folder, 2) if kind == "a link" else folder / "gone"
        place.symlink_to(target)
    before = list(contents(place).values())
    for name in ("checkpoint-4.set-aside", "checkpoint-4.set-aside-2"):
        made = checkpoints.begin(folder) / "checkpoint-4"
        write_files(made, 4)
        checkpoints.seal(made)
        assert checkpoints.publish(made, folder) == folder / name
        assert find_fault(place) is None and not (folder / checkpoints.UNFINISHED).exists()
    assert list(contents(folder / "checkpoint-4.set-aside").values()) == before


@pytest.mark.parametrize("kind", ["a file", "a dead link", "a link"])
def test_the_folder_may_be_a_link_and_nothing_else(stage, folder, tmp_path, kind):
    folder.rmdir()
    if kind == "a file":
        folder.write_text("mine")
    else:
        folder.symlink_to(tmp_path / "bigger disk")
    if kind == "a link":
        make(tmp_path / "bigger disk", 2)
        assert find_resumable(stage, folder) == folder / "checkpoint-2"
        return
    with pytest.raises(StageError, match=str(folder)):
        find_resumable(stage, folder)


class Training(MaskedTraining):
    """The trainer without transformers' initialization, writing through transformers' names."""

    def __init__(self, folder: Path, step: int, limit: int = 3):
        training = SimpleNamespace(save_total_limit=limit)
        config: object = SimpleNamespace(training=training)
        self.run = SimpleNamespace(checkpoints=folder, config=config)  # type: ignore[assignment]
        self.state = TrainerState(global_step=step)


@pytest.fixture
def saved(monkeypatch):
    """Let transformers' part write files, or be killed after some of them."""

    def install(killed: bool = False) -> None:
        def save(self, model, trial):
            path = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            write_files(path, self.state.global_step)
            if killed:
                raise KeyboardInterrupt("SIGTERM")
            if path.exists() and self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(path)
            self.state.save_to_json(str(path / "trainer_state.json"))

        monkeypatch.setattr(Trainer, "_save_checkpoint", save)

    return install


def test_a_checkpoint_appears_whole_and_older_ones_go(saved, folder, capsys):
    saved()
    for step in (1, 2, 3, 4):
        training = Training(folder, step, limit=2)
        training.state.best_global_step, training.state.best_metric = 1, 0.5
        training.state.best_model_checkpoint = str(folder / "checkpoint-1")
        training._write_checkpoint(None, None)
        path = folder / f"checkpoint-{step}"
        state = json.loads((path / "trainer_state.json").read_text())
        assert find_fault(path) is None and training.newest == path.name
        assert training.state.best_model_checkpoint == str(folder / "checkpoint-1")
        assert state["best_model_checkpoint"] == str(folder / "checkpoint-1")
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-1", "checkpoint-4"]
    assert capsys.readouterr().out == ""


def test_a_kill_while_writing_leaves_nothing_that_looks_whole(saved, stage, folder):
    make(folder, 2)
    saved(killed=True)
    with pytest.raises(KeyboardInterrupt):
        Training(folder, 4)._write_checkpoint(None, None)
    left = sorted(path.name for path in folder.iterdir())
    assert left == [checkpoints.UNFINISHED, "checkpoint-2"]
    assert find_resumable(stage, folder) == folder / "checkpoint-2"
    assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]
    saved()
    Training(folder, 4)._write_checkpoint(None, None)
    assert find_fault(folder / "checkpoint-4") is None


def test_transformers_own_rotation_is_off(monkeypatch):
    def begin(self):
        self.args = SimpleNamespace(save_total_limit=4)

    monkeypatch.setattr(Trainer, "__init__", begin)
    monkeypatch.setattr(MaskedTraining, "run", SimpleNamespace(is_trained=bool), raising=False)
    assert MaskedTraining().args.save_total_limit is None


@pytest.mark.parametrize(
    ("fault", "best"), [("none", 4), ("gone", 6), ("damaged", 6), ("all damaged", None)]
)
def test_the_next_best_checkpoint_replaces_a_damaged_one(folder, capsys, fault, best):
    """Losses are recorded for every evaluation; that of step 8 was not finite."""
    losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: float("nan"), 10: 0.1}
    for step in (2, 4, 6, 8):
        make(folder, step)
    training = Training(folder, 8)
    training.state.log_history = [{"step": step, "eval_loss": v} for step, v in losses.items()]
    training.state.best_model_checkpoint = "/before/the/move/checkpoint-4"
    training.state.best_metric, training.state.best_global_step = 1.0, 4
    if fault == "gone":
        shutil.rmtree(folder / "checkpoint-4")
    elif fault == "damaged":
        damage(folder / "checkpoint-4/adapter_model.safetensors", "flipped")
    elif fault == "all damaged":
        for step in (2, 4, 6):
            damage(folder / f"checkpoint-{step}/masks.safetensors", "cut")
    training._settle_best()
    state = training.state
    assert state.best_global_step == best
    assert state.best_metric == (losses[best] if best else None)
    assert state.best_model_checkpoint == (str(folder / f"checkpoint-{best}") if best else None)
    told = capsys.readouterr().out
    assert ("the best checkpoint, checkpoint-4, cannot be used" in told) is (fault != "none")


def test_every_rank_has_the_first_ones_best(folder, monkeypatch):
    world = SimpleNamespace(is_first=lambda: False, collect=lambda own: [(6, 2.0), own])
    monkeypatch.setattr(masked_trainer, "ranks", world)
    training = Training(folder, 8)
    training.state.best_model_checkpoint = str(folder / "checkpoint-4")
    training._settle_best()
    assert training.state.best_model_checkpoint == str(folder / "checkpoint-6")


ENDED = TrainerEnded("the trainer ended with exit code 1", "exit code 0", "KeyError", "see log.txt")


@pytest.mark.parametrize("end", [KeyboardInterrupt("SIGTERM"), ENDED])
@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ("nothing", "trains from the start, because there is no whole checkpoint yet"),
        ("damaged", "trains from the start, because there is no whole checkpoint yet"),
        ("whole", "continues from checkpoint-2"),
        ("trained", "only writes the result, from checkpoint-2 on"),
    ],
)
def test_the_end_of_a_training_says_what_a_rerun_does(
    stage, folder, monkeypatch, end, forced, state, sentence
):
    def fail(*_):
        raise end

    monkeypatch.setattr(trainer, "train_together", fail)
    stage.forced = forced
    if state != "nothing":
        make(folder, 2)
    if state == "damaged":
        damage(folder / "checkpoint-2/optimizer.pt", "empty")
    if state == "trained":
        (stage.dir / "trained.json").write_text('{"newest": "checkpoint-2"}')
    with pytest.raises(StageError) as failure:
        trainer._train_explained(stage, TrainingRun.of_stage(stage))
    again = "the same command without --force" if forced else "the same command"
    assert again in failure.value.fix and failure.value.fix.endswith(sentence)
    assert ("without --force" in failure.value.fix) is forced
