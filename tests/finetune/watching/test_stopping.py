"""When training ends early, what it says, and what a restart knows of it."""

import json
from dataclasses import asdict

import pytest
from transformers import TrainerControl, TrainerState

from sparselong.finetune.state import Progress
from sparselong.finetune.watching import Stopping


class Run:
    """Losses that a trainer reports, one step after another."""

    def __init__(self, progress: Progress | None = None, **asked):
        given = {"loss_target": None, "patience": None, "threshold": 0.0, **asked}
        self.progress = progress or Progress()
        self.stopping = Stopping(self.progress, **given)
        self.state, self.control = TrainerState(), TrainerControl()

    def train(self, loss: float) -> bool:
        """A training step's loss; returns whether training stops."""
        self.state.global_step += 1
        self.stopping.on_log(None, self.state, self.control, logs={"loss": loss})
        return self.control.should_training_stop

    def evaluate(self, loss: float) -> bool:
        logs = {"eval_loss": loss}
        self.stopping.on_log(None, self.state, self.control, logs=logs)
        self.stopping.on_evaluate(None, self.state, self.control, metrics=logs)
        return self.control.should_training_stop


def test_nothing_stops_unless_it_is_asked_for(capsys):
    run = Run()
    assert not any(run.train(0.0) or run.evaluate(5.0) for _ in range(20))
    assert run.progress.stopped is None and capsys.readouterr().out == ""


def test_a_training_loss_at_the_target_stops_after_an_evaluation_and_a_checkpoint(capsys):
    run = Run(loss_target=2.0)
    assert [run.train(loss) for loss in (3.0, 2.0001, 2.0)] == [False, False, True]
    assert run.control.should_evaluate and run.control.should_save
    reason = "the training loss 2.0000 has reached training.loss_target (2)"
    assert run.progress.stopped == {"step": 3, "reason": reason}
    run.evaluate(1.0)  # the evaluation that was asked for
    assert run.progress.stopped["step"] == 3 and "training loss" in run.progress.stopped["reason"]
    assert capsys.readouterr().out.count("stopping at step 3") == 1


def test_a_validation_loss_at_the_target_stops():
    run = Run(loss_target=2.0)
    assert not run.evaluate(1.0)  # stage 02's model, before the first step
    assert not run.train(3.0) and not run.evaluate(float("nan")) and run.evaluate(2.0)
    assert run.control.should_save and "validation loss 2.0000" in run.progress.stopped["reason"]


@pytest.mark.parametrize(
    ("patience", "threshold", "losses", "stops_after"),
    [
        (2, 0.0, [3.0, 3.0, 2.9, 2.9, 3.1], 5),  # equal is no improvement; 2.9 starts again
        (1, 0.0, [3.0, 2.0, 1.0, 1.0], 4),
        (2, 0.5, [3.0, 2.6, 2.4, 2.2, 2.0], 5),  # 2.6 is not enough below 3.0, 2.4 is
        (2, 0.0, [3.0, float("nan"), float("nan")], 3),
        (3, 0.0, [3.0, 3.0, 3.0], None),
    ],
)
def test_patience_counts_evaluations_in_a_row(patience, threshold, losses, stops_after):
    run, stopped = Run(patience=patience, threshold=threshold), None
    run.evaluate(0.1)  # before the first step: no reference
    for number, loss in enumerate(losses, 1):
        run.train(9.0)
        if run.evaluate(loss):
            stopped = number
            break
    assert stopped == stops_after
    if stopped:
        count = "1 evaluation" if patience == 1 else f"{patience} evaluations"
        assert run.progress.stopped["reason"].startswith(f"{count} without a validation loss")
        assert f"below {min(losses[:stopped]):.4f}" in run.progress.stopped["reason"] or threshold
        assert "early_stopping_patience" in run.progress.stopped["reason"]
        assert run.progress.stopped["step"] == stopped


def test_a_restart_counts_on_from_the_checkpoint():
    run = Run(patience=3)
    for loss in (3.0, 3.5, 3.5):
        run.train(9.0)
        run.evaluate(loss)
    stored = json.loads(json.dumps(asdict(run.progress)))
    again = Run(Progress(**stored), patience=3)
    again.train(9.0)
    assert again.evaluate(3.2)
