"""Rows of metrics.jsonl, trackers and progress; a stop at a loss that is not finite."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from sparselong.errors import StageError
from sparselong.figures import format_bytes, format_figure
from sparselong.finetune.state import Progress
from sparselong.finetune.watching.predictions import Predictions
from sparselong.finetune.watching.trackers import Tracker
from sparselong.processes import report_progress, tell

_STEP = "training step"


class Metrics(TrainerCallback):
    """Writes metrics.jsonl, feeds trackers and display, and stops at a non-finite loss.

    Every row has `step` and `epoch`. Training rows add `tokens` (without padding, so far), `loss`,
    `learning_rate`, `grad_norm`, `tokens_per_second`, peak memory and, if masks were updated since
    the previous row, `mask_flipped_fraction`. Evaluation rows add `eval_loss`, `eval_perplexity`
    and, if there is a function of the user's, its figures as `metrics`.

    Args:
        path: path of metrics.jsonl; None on a rank that writes nothing.
        progress: the run's counters.
        next_update: returns the step of the first mask update after a step, None without one.
        open_trackers: opens those that get every row, given the run's name and the first row's
            step; called with the first row.
        predictions: has the figures of the user's function at the last evaluation.
    """

    def __init__(
        self,
        path: Path | None,
        progress: Progress,
        next_update: Callable[[int], int | None],
        open_trackers: Callable[[str, int], Sequence[Tracker]],
        predictions: Predictions | None = None,
    ):
        self.path, self.progress, self.predictions = path, progress, predictions
        self.next_update, self.open_trackers = next_update, open_trackers
        self.trackers: Sequence[Tracker] | None = None
        self.seconds, self.started, self.tokens = 0.0, 0.0, progress.tokens
        self.updates = len(progress.mask_updates)

    def on_train_begin(self, args, state, control, **kwargs):
        """Continue from a resumed run's counters."""
        report_progress(_STEP, state.global_step, state.max_steps)
        self.tokens, self.updates = self.progress.tokens, len(self.progress.mask_updates)

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the step's clock."""
        self.started = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop the step's clock, and log the last step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.monotonic() - self.started
        if state.global_step >= state.max_steps:
            control.should_log = True
        return control

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs):
        """Write a training or evaluation row."""
        logs = logs or {}
        row: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        if "loss" in logs:
            self._check(state.global_step, logs)
            row |= self._training_row(logs)
            report_progress(_STEP, state.global_step, state.max_steps, self._describe(row))
        elif "eval_loss" in logs:
            self._check_evaluation(state.global_step, logs["eval_loss"])
            row["eval_loss"] = logs["eval_loss"]
            row["eval_perplexity"] = math.exp(min(logs["eval_loss"], 700.0))
            found = self.predictions.figures if self.predictions is not None else {}
            row |= {"metrics": found} if found else {}
            told = [f"validation perplexity {row['eval_perplexity']:.4f}"]
            told += [f"{name} {format_figure(name, value)}" for name, value in found.items()]
            tell(f"step {state.global_step}: {', '.join(told)}")
        else:
            return
        if self.path is not None:
            self._write(self.path, row)

    def _write(self, path: Path, row: dict[str, Any]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.trackers is None:
            self.trackers = self.open_trackers(self.progress.tracker, row["step"])
        for tracker in self.trackers:
            tracker.log(row)

    def on_train_end(self, args, state, control, **kwargs):
        """End the progress, which may be before its last step, and close the trackers."""
        if state.global_step < state.max_steps:
            report_progress(_STEP, state.global_step, state.global_step)
        for tracker in self.trackers or ():
            tracker.close()

    def on_evaluate(self, args, state, control, metrics: dict[str, float] | None = None, **kwargs):
        """Save a new best checkpoint even if evaluations are more frequent than saves."""
        loss = (metrics or {}).get("eval_loss", math.inf)
        if state.global_step and loss < (
            math.inf if state.best_metric is None else state.best_metric
        ):
            control.should_save = True
        return control

    def _training_row(self, logs: dict[str, Any]) -> dict[str, Any]:
        updates = self.progress.mask_updates[self.updates :]
        row = {
            "tokens": self.progress.tokens,
            "loss": logs["loss"],
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "tokens_per_second": (self.progress.tokens - self.tokens) / max(self.seconds, 1e-9),
            **{
                f"peak_bytes_{device}": count
                for device, count in self.progress.note_peaks().items()
            },
        }
        if updates:
            row["mask_flipped_fraction"] = sum(update["flipped"] for update in updates)
        self.tokens, self.seconds = self.progress.tokens, 0.0
        self.updates = len(self.progress.mask_updates)
        return row

    def _check(self, step: int, logs: dict[str, Any]) -> None:
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise StageError(
                    f"training diverged at step {step}",
                    f"a finite {name}",
                    f"{name} {logs[name]}",
                    "lower training.learning_rate and pass --force, or look for bad rows in the "
                    "data; the same command would diverge again",
                )

    def _check_evaluation(self, step: int, loss: float) -> None:
        if math.isfinite(loss):
            return
        fix = "lower training.learning_rate and pass --force"
        if step == 0:
            fix = "redo stage 02 with other settings: python 02_compress.py --force"
        raise StageError(
            f"the validation loss at step {step} is not finite",
            "a finite loss, without which there is no best checkpoint",
            f"validation loss {loss}",
            f"look for bad rows in the validation data with --preview FILE:LINE, or {fix}",
        )

    def _describe(self, row: dict[str, Any]) -> str:
        """Return a training row's figures as a person reads them."""
        gpus = [count for name, count in row.items() if name.startswith("peak_bytes_cuda")]
        words = [f"loss {row['loss']:.4f}", f"{row['tokens_per_second']:,.0f} tokens/s"]
        words.append(f"peak {format_bytes(max(gpus, default=row['peak_bytes_host']))}")
        step = self.next_update(row["step"])
        return ", ".join([*words, *([f"next mask update at {step}"] if step else [])])
