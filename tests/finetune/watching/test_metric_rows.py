"""Rows of metrics.jsonl, what is shown of them, a stop at NaN, saving the best checkpoint."""

import json
import math
from types import SimpleNamespace

import pytest

from sparselong.errors import StageError
from sparselong.finetune.state import Progress
from sparselong.finetune.watching.metrics import Metrics
from sparselong.processes.marks import PROGRESS


def at(step: int, **more) -> SimpleNamespace:
    values = {"max_steps": 20, "epoch": 0.5, "best_metric": None, "best_model_checkpoint": None}
    return SimpleNamespace(global_step=step, **{**values, **more})


def control() -> SimpleNamespace:
    return SimpleNamespace(should_log=False, should_save=False)


class Recorder:
    """A tracker that keeps its rows."""

    def __init__(self):
        self.rows, self.closed = [], 0

    def log(self, row: dict) -> None:
        self.rows.append(row)

    def close(self) -> None:
        self.closed += 1


def metrics_of(path, progress, trackers=(), predictions=None) -> Metrics:
    steps = {0: 5, 1: 5, 7: None}
    return Metrics(path, progress, steps.get, lambda name, step: trackers, predictions)


def test_rows_hold_the_known_values(tmp_path, capsys):
    progress, tracker = Progress(), Recorder()
    custom = SimpleNamespace(figures={"accuracy": 0.5, "odd": None})
    metrics = metrics_of(tmp_path / "metrics.jsonl", progress, [tracker], custom)
    metrics.on_train_begin(None, at(0), control())
    metrics.on_log(None, at(0), control(), {"eval_loss": math.log(8)})
    progress.tokens = 100
    metrics.on_step_begin(None, at(0), control())
    metrics.on_step_end(None, at(1), control())
    progress.mask_updates.append({"step": 1, "flipped": 0.125})
    metrics.on_log(None, at(1), control(), {"loss": 2.0, "grad_norm": 1.0, "learning_rate": 0.1})
    metrics.on_log(None, at(1), control(), {"train_runtime": 1.0})  # adds no row
    rows = list(map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()))
    first, second = rows
    assert first["step"] == 0 and first["eval_perplexity"] == pytest.approx(8.0)
    assert first["metrics"] == {"accuracy": 0.5, "odd": None}
    assert (second["tokens"], second["loss"], second["learning_rate"]) == (100, 2.0, 0.1)
    assert second["mask_flipped_fraction"] == 0.125
    assert second["tokens_per_second"] > 0 and second["peak_bytes_host"] > 0
    assert tracker.rows == rows
    metrics.on_train_end(None, at(1), control())
    assert tracker.closed == 1  # and the count, which was stopped early, has ended
    told = capsys.readouterr().out.splitlines()
    assert "step 0: validation perplexity 8.0000, accuracy 0.5, odd None" in told[1]
    reports = (told[0], told[2], told[3])
    begun, last, end = (json.loads(each.removeprefix(PROGRESS)) for each in reports)
    assert end == ["training step", 1, 1, ""]
    assert begun == ["training step", 0, 20, ""]
    what, done, total, note = last
    assert (what, done, total) == ("training step", 1, 20)
    assert note.startswith("loss 2.0000, ") and " tokens/s, peak " in note
    assert note.endswith("iB, next mask update at 5")


def test_other_ranks_write_nothing(tmp_path):
    tracker = Recorder()
    metrics_of(None, Progress(), [tracker]).on_log(None, at(7), control(), {"loss": 1.0})
    assert tracker.rows == [] and list(tmp_path.iterdir()) == []


def test_a_resumed_run_has_its_name_at_trackers(tmp_path):
    progress, opened = Progress(tracker="abc"), []
    metrics = Metrics(
        tmp_path / "m", progress, lambda step: None, lambda *given: opened.append(given) or ()
    )
    for step in (7, 8):
        metrics.on_log(None, at(step), control(), {"loss": 1.0})
    assert opened == [("abc", 7)]
    assert Progress().tracker != Progress().tracker


@pytest.mark.parametrize("logs", [{"loss": math.nan}, {"loss": 1.0, "grad_norm": math.inf}])
def test_a_non_finite_loss_stops_and_names_the_step(tmp_path, logs):
    metrics = metrics_of(tmp_path / "metrics.jsonl", Progress())
    with pytest.raises(StageError, match="diverged at step 7"):
        metrics.on_log(None, at(7), control(), logs)


@pytest.mark.parametrize(("step", "fix"), [(0, "02_compress.py"), (7, "learning_rate")])
def test_a_non_finite_validation_loss_stops_before_hours_without_a_best(tmp_path, step, fix):
    metrics = metrics_of(tmp_path / "metrics.jsonl", Progress())
    with pytest.raises(StageError, match=f"(?s)validation loss at step {step} .*{fix}"):
        metrics.on_log(None, at(step), control(), {"eval_loss": math.nan})


@pytest.mark.parametrize(
    ("step", "best", "loss", "saved"),
    [(10, None, 3.0, True), (10, 2.0, 1.5, True), (10, 1.0, 1.5, False), (0, None, 3.0, False)],
)
def test_a_new_best_is_saved_at_once(tmp_path, step, best, loss, saved):
    metrics, flow = metrics_of(tmp_path / "m", Progress()), control()
    metrics.on_evaluate(None, at(step, best_metric=best), flow, {"eval_loss": loss})
    assert flow.should_save is saved
