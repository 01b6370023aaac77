"""End training at a loss that was asked for, or once the validation loss improves no more.

Every rank sees the same losses, so all of them stop at the same step. That step is evaluated and
saved like the last one of a full run. The decision is in the checkpoint, so that a run that is
started again does not train on.
"""

from __future__ import annotations

from transformers import TrainerCallback

from sparselong.finetune.state import Progress
from sparselong.processes import tell


class Stopping(TrainerCallback):
    """Stops training, and notes step and reason in the run's counters.

    Args:
        progress: the run's counters.
        loss_target: training or validation loss at which to stop; None: never.
        patience: evaluations in a row without improvement after which to stop; None: never.
        threshold: by how much a loss must be lower to be an improvement.
    """

    def __init__(
        self,
        progress: Progress,
        loss_target: float | None,
        patience: int | None,
        threshold: float,
    ):
        self.progress, self.loss_target = progress, loss_target
        self.patience, self.threshold = patience, threshold

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Stop at a training loss; evaluations come here too, but `on_evaluate` sees them."""
        if "loss" in (logs or {}) and self._compare("training", logs["loss"], state, control):
            control.should_evaluate = True  # the trainer has yet to look whether to evaluate

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Stop at a validation loss, or at the last of too many that are no lower."""
        loss, progress = (metrics or {}).get("eval_loss"), self.progress
        if loss is None or not state.global_step:  # the curve begins with stage 02's model
            return
        self._compare("validation", loss, state, control)
        if progress.lowest_loss is None or loss < progress.lowest_loss - self.threshold:
            progress.lowest_loss, progress.waited = loss, 0
            return
        progress.waited += 1
        if self.patience is not None and progress.waited >= self.patience:
            above = f" by more than {self.threshold:g}" * bool(self.threshold)
            count = f"{progress.waited} evaluation{'s' * (progress.waited > 1)}"
            self._stop(
                f"{count} without a validation loss below "
                f"{progress.lowest_loss:.4f}{above} (training.early_stopping_patience)",
                state,
                control,
            )

    def _compare(self, kind: str, loss: float, state, control) -> bool:
        if self.loss_target is None or not loss <= self.loss_target:  # NaN has reached nothing
            return False
        target = f"training.loss_target ({self.loss_target:g})"
        self._stop(f"the {kind} loss {loss:.4f} has reached {target}", state, control)
        return True

    def _stop(self, reason: str, state, control) -> None:
        if self.progress.stopped is not None:
            return
        self.progress.stopped = {"step": state.global_step, "reason": reason}
        control.should_save = control.should_training_stop = True
        tell(f"stopping at step {state.global_step}: {reason}")
