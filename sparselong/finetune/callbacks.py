"""Callbacks of the trainer: mask updates, recomputation, metrics and alerts.

Output for the user is printed on lines that start with `MARK`. The stage's process shows these
lines, and writes the rest of Axolotl's output to log.txt.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from sparselong.adapters import Criterion, MaskedLoraLinear, update_steps
from sparselong.errors import StageError
from sparselong.finetune.state import Progress, buffers
from sparselong.model import slice_rows
from sparselong.processes import MARK, check_replicas
from sparselong.run import note_session
from sparselong.runtime import DeviceInputs, HostInputs, checkpoint_contexts

_NOTED_SECONDS = 30.0


def tell(text: str) -> None:
    """Print lines for the stage's process to show."""
    for line in text.splitlines() or [""]:
        print(f"{MARK}{line}", flush=True)


class MaskUpkeep(TrainerCallback):
    """Updates the 2:4 masks after each `update_frequency` of the steps (adapters.update_steps)."""

    def __init__(
        self,
        layers: Mapping[str, MaskedLoraLinear],
        progress: Progress,
        update_frequency: float,
        criterion: Criterion,
    ):
        self.layers, self.progress = layers, progress
        self.update_frequency = update_frequency
        self.criterion: Criterion = criterion
        self.steps: set[int] = set()

    def on_train_begin(self, args, state, control, **kwargs):
        """Schedule the updates."""
        self.steps = set(update_steps(state.max_steps, self.update_frequency))

    def on_step_end(self, args, state, control, **kwargs):
        """Update the masks, and check that they are the same on every rank."""
        if state.global_step not in self.steps:
            return
        flipped, bits = defaultdict(float), defaultdict(int)
        for name, layer in self.layers.items():
            kind, size = name.rpartition(".")[2], layer.master.numel()
            share = layer.update(self.criterion)
            for key in (kind, "all"):
                flipped[key] += share * size
                bits[key] += size
        fractions = {key: flipped[key] / bits[key] for key in bits}
        overall = fractions.pop("all")
        self.progress.mask_updates.append(
            {"step": state.global_step, "flipped": overall, "flipped_by_kind": fractions}
        )
        check_replicas(buffers(self.layers), state.global_step)
        by_kind = ", ".join(f"{kind} {share:.3%}" for kind, share in fractions.items())
        tell(f"step {state.global_step}: mask update flipped {overall:.3%} of the bits ({by_kind})")


class Recomputation(TrainerCallback):
    """Lets checkpointed layers compute as was decided.

    They skip parts of their recomputation (runtime/recompute.py), or compute in slices of rows and
    keep their inputs in host memory (model/row_slices.py).

    Args:
        keep_attention: whether they keep the output of full attention.
        keep_experts: whether they keep the experts' gate_up output, which needs whole layers.
        rows: most tokens per slice; None: whole layers, whose inputs stay on the device.
        offloads: whether inputs are kept in host memory.
    """

    def __init__(
        self,
        keep_attention: bool,
        keep_experts: bool,
        rows: int | None = None,
        offloads: bool = False,
    ):
        self.contexts = partial(checkpoint_contexts, keep_attention, keep_experts)
        self.keep_attention, self.rows = keep_attention, rows
        self.inputs = HostInputs() if offloads else DeviceInputs()

    def on_train_begin(self, args, state, control, **kwargs):
        """Replace the plain checkpointing that the trainer has just enabled."""
        if self.rows is not None:
            base = kwargs["model"].get_base_model()
            slice_rows(base, self.rows, self.inputs, self.keep_attention)
        elif args.gradient_checkpointing:
            arguments = {"use_reentrant": False, "context_fn": self.contexts}
            # No layer uses random numbers: adapters have no dropout.
            arguments["preserve_rng_state"] = False
            kwargs["model"].gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)


class Clock(TrainerCallback):
    """Notes for how long the session has trained (run/spent.py), at most twice a minute.

    Args:
        folder: the stage's directory; None on a rank that writes nothing.
    """

    def __init__(self, folder: Path | None):
        self.folder, self.noted = folder, time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        """Note the name of the GPU."""
        if self.folder is not None and torch.cuda.is_available():
            note_session(self.folder, torch.cuda.get_device_name())

    def on_step_end(self, args, state, control, **kwargs):
        """Note the time."""
        if self.folder is not None and time.monotonic() - self.noted >= _NOTED_SECONDS:
            self.noted = time.monotonic()
            note_session(self.folder)


class Metrics(TrainerCallback):
    """Writes metrics.jsonl, alerts once at the loss target, and stops at a non-finite loss.

    Every row has `step` and `epoch`. Training rows add `tokens` (without padding, so far), `loss`,
    `learning_rate`, `grad_norm`, `tokens_per_second`, peak memory and, if masks were updated since
    the previous row, `mask_flipped_fraction`. Evaluation rows add `eval_loss` and
    `eval_perplexity`.

    Args:
        path: path of metrics.jsonl; None on a rank that writes nothing.
        progress: the run's counters.
        loss_target: training loss at which to alert; None: never.
    """

    def __init__(self, path: Path | None, progress: Progress, loss_target: float | None):
        self.path, self.progress, self.loss_target = path, progress, loss_target
        self.seconds, self.started, self.tokens = 0.0, 0.0, progress.tokens
        self.updates = len(progress.mask_updates)

    def on_train_begin(self, args, state, control, **kwargs):
        """Continue from a resumed run's counters."""
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
            tell(
                f"step {state.global_step}/{state.max_steps}: loss {row['loss']:.4f}, "
                f"{row['tokens_per_second']:,.0f} tokens/s"
            )
            self._alert(state.global_step, row["loss"])
        elif "eval_loss" in logs:
            row["eval_loss"] = logs["eval_loss"]
            row["eval_perplexity"] = math.exp(min(logs["eval_loss"], 700.0))
            tell(f"step {state.global_step}: validation perplexity {row['eval_perplexity']:.4f}")
        else:
            return
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

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

    def _alert(self, step: int, loss: float) -> None:
        if self.loss_target is None or self.progress.alerted or loss > self.loss_target:
            return
        self.progress.alerted = True
        tell(f"ALERT step {step}: training loss {loss:.4f} has reached {self.loss_target}")
