"""TensorBoard for real, Weights & Biases and trackio as stand-ins: the same figures, by name."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sparselong.config import load
from sparselong.errors import StageError
from sparselong.finetune.training_run import TrainingRun
from sparselong.finetune.watching import check_trackers, open_trackers
from sparselong.processes import process
from tests.conftest import ROOT

ROWS = [
    {"step": 0, "epoch": 0.0, "eval_loss": 2.0, "metrics": {"accuracy": 0.5, "odd": None}},
    {
        **{"step": 1, "epoch": 0.1, "loss": 1.5, "learning_rate": 0.1, "tokens_per_second": 9.0},
        **{"peak_bytes_host": 2**30, "mask_flipped_fraction": 0.25, "grad_norm": None},
    },
]
FIGURES = [
    {"epoch": 0.0, "eval_loss": 2.0, "metrics/accuracy": 0.5},
    {
        **{"epoch": 0.1, "loss": 1.5, "learning_rate": 0.1, "tokens_per_second": 9.0},
        **{"peak_bytes_host": 2**30, "mask_flipped_fraction": 0.25},
    },
]


def run_of(folder, *overrides: str) -> TrainingRun:
    (folder / "03_finetune").mkdir(exist_ok=True)
    return TrainingRun(folder, load(ROOT / "configs/tiny.yaml", list(overrides)))


def log(run: TrainingRun, rows=ROWS, first_step: int = 0) -> None:
    trackers = open_trackers(run, "abc123", first_step)
    for tracker in trackers:
        for row in rows:
            tracker.log(row)
        tracker.close()


def test_none_is_opened_unless_it_is_asked_for(tmp_path):
    run = run_of(tmp_path)
    check_trackers(run.config)
    assert open_trackers(run, "abc", 0) == [] and not list(run.work.iterdir())


def events(run: TrainingRun) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(run.work / "tensorboard")).Reload()
    names = found.Tags()["scalars"]
    return {name: [(event.step, event.value) for event in found.Scalars(name)] for name in names}


def test_tensorboard_gets_every_figure(tmp_path):
    run = run_of(tmp_path, "training.use_tensorboard=true")
    check_trackers(run.config)
    log(run)
    found = events(run)
    assert {name for name, _ in found.items()} == set().union(*FIGURES)
    for row, figures in zip(ROWS, FIGURES, strict=True):
        for name, value in figures.items():
            assert (row["step"], pytest.approx(value)) in found[name]


def test_rows_that_a_resumed_run_repeats_replace_the_lost_ones(tmp_path):
    run = run_of(tmp_path, "training.use_tensorboard=true")
    log(run, [{"step": step, "loss": 5.0} for step in (1, 2, 3)])
    log(run, [{"step": step, "loss": 4.0} for step in (2, 3)], first_step=2)
    assert events(run)["loss"] == [(1, 5.0), (2, 4.0), (3, 4.0)]


class Wandb(ModuleType):
    """Stands in for wandb."""

    def __init__(self):
        super().__init__("wandb")
        self.rows, self.finished = [], 0

    def Settings(self, **given):
        return given

    def init(self, **given):
        self.given = given
        return self

    def log(self, figures: dict, step: int) -> None:
        self.rows.append((step, figures))

    def finish(self) -> None:
        self.finished += 1


def test_wandb_gets_every_figure_in_the_runs_directory(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", stand_in := Wandb())
    run = run_of(tmp_path, "training.wandb_project=trial")
    log(run)
    assert stand_in.rows == list(enumerate(FIGURES)) and stand_in.finished == 1
    given = stand_in.given
    assert (given["project"], given["id"], given["resume"]) == ("trial", "abc123", "allow")
    assert given["dir"] == str(run.work) and given["name"] == tmp_path.name
    assert given["config"]["training"]["wandb_project"] == "trial"


def test_nothing_is_uploaded_unless_the_environment_says_so(monkeypatch):
    names = ("WANDB_MODE", "WANDB_ERROR_REPORTING", "DO_NOT_TRACK")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    found = process._environment()
    assert [found[name] for name in names] == ["offline", "false", "1"]
    monkeypatch.setenv("WANDB_MODE", "online")
    assert process._environment()["WANDB_MODE"] == "online"


def test_trackio_gets_every_figure(tmp_path, monkeypatch):
    stand_in = ModuleType("trackio")
    rows, given = [], {}
    vars(stand_in).update(
        init=lambda **arguments: given.update(arguments),
        log=lambda figures, step: rows.append((step, figures)),
        finish=lambda: rows.append("finished"),
    )
    monkeypatch.setitem(sys.modules, "trackio", stand_in)
    log(run_of(tmp_path, "training.trackio_project=trial"))
    assert rows == [*enumerate(FIGURES), "finished"]
    assert (given["project"], given["name"]) == ("trial", f"{tmp_path.name}-abc123")
    assert given["resume"] == "allow" and given["embed"] is False


def test_a_tracker_that_is_not_installed_is_refused_with_the_command(tmp_path, monkeypatch):
    run = run_of(tmp_path, "training.trackio_project=trial")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gradio" else 1)
    with pytest.raises(StageError, match=r"training\.trackio_project needs packages") as refused:
        check_trackers(run.config)
    assert refused.value.found == "no gradio"
    assert f"uv pip install --python {sys.executable} gradio" in refused.value.fix


def test_a_tracker_that_cannot_be_opened_ends_the_run_and_names_its_key(tmp_path, monkeypatch):
    stand_in = SimpleNamespace(init=lambda **_: 1 / 0, Settings=lambda **_: None)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    with pytest.raises(StageError, match=r"training\.wandb_project could not be opened"):
        open_trackers(run_of(tmp_path, "training.wandb_project=trial"), "abc", 0)


def test_a_tracker_that_fails_later_is_told_of_once_and_ends_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", stand_in := Wandb())
    monkeypatch.setattr(stand_in, "log", lambda figures, step: 1 / 0)
    log(run_of(tmp_path, "training.wandb_project=trial"))
    told = capsys.readouterr().out
    assert told.count("training.wandb_project gets no more figures: ZeroDivisionError") == 1
    assert stand_in.finished == 0
