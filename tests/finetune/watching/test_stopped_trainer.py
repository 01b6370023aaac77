"""transformers' own training loop with our callback: where it stops, and what it leaves."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from sparselong.finetune.state import Progress
from sparselong.finetune.watching import Stopping


class Line(nn.Module):
    """y = w x, whose loss falls from step to step, and the validation's with it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x, labels):
        return {"loss": (self.weight * x - labels).pow(2).mean()}


ROWS = [{"x": torch.ones(1), "labels": torch.ones(1)}] * 8


def train(folder: Path, **asked) -> tuple[Trainer, Progress]:
    progress = Progress()
    given = {"loss_target": None, "patience": None, "threshold": 0.0, **asked}
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=20, eval_steps=4, save_steps=4, logging_steps=1,
        eval_strategy="steps", save_strategy="steps", load_best_model_at_end=True, use_cpu=True,
        metric_for_best_model="eval_loss", learning_rate=0.05, lr_scheduler_type="constant",
        report_to=[], disable_tqdm=True, eval_on_start=True, per_device_train_batch_size=8,
        save_total_limit=None, logging_nan_inf_filter=False,
    )  # fmt: skip
    stopping = Stopping(progress, **given)
    trainer = Trainer(
        Line(), arguments, train_dataset=ROWS, eval_dataset=ROWS, callbacks=[stopping]
    )
    trainer.train()
    return trainer, progress


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def evaluated(trainer: Trainer) -> list[int]:
    return [row["step"] for row in trainer.state.log_history if "eval_loss" in row]


def test_a_training_loss_between_evaluations_ends_it_with_one_more(tmp_path):
    trainer, progress = train(tmp_path, loss_target=0.6)  # (1 - 0.05 n)² after n steps
    assert progress.stopped and progress.stopped["step"] == trainer.state.global_step == 6
    assert evaluated(trainer) == [0, 4, 6]
    assert checkpoints(tmp_path) == ["checkpoint-4", "checkpoint-6"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-6")


def test_a_validation_loss_ends_it_where_it_was_evaluated(tmp_path):
    """The loss before the step is logged as the step's: evaluations reach the target first."""
    trainer, progress = train(tmp_path, loss_target=0.65)
    assert progress.stopped and "validation loss" in progress.stopped["reason"]
    assert trainer.state.global_step == 4 and evaluated(trainer) == [0, 4]
    assert checkpoints(tmp_path) == ["checkpoint-4"]


@pytest.mark.parametrize(("threshold", "last"), [(0.0, 20), (0.9, 12)])
def test_patience_ends_it_without_improvement(tmp_path, threshold, last):
    trainer, progress = train(tmp_path, patience=2, threshold=threshold)
    assert trainer.state.global_step == last and (progress.stopped is None) is (last == 20)
    assert evaluated(trainer) == list(range(0, last + 1, 4))
    assert f"checkpoint-{last}" in checkpoints(tmp_path)
