"""Callbacks of the trainer that act on the model: mask updates and recomputation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from transformers import TrainerCallback

from sparselong.adapters import Criterion, MaskedLoraLinear, update_steps
from sparselong.finetune.state import Progress, buffers
from sparselong.model import slice_rows
from sparselong.processes import check_replicas, tell
from sparselong.runtime import DeviceInputs, HostInputs, checkpoint_layers

_NOTED_SECONDS = 30.0


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

    def next_step(self, step: int) -> int | None:
        """Return the step of the first update after a step, None if there is none."""
        return min((each for each in self.steps if each > step), default=None)

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
        keep_experts: how many layers keep the experts' gate_up output, the last ones of the model;
            only whole layers can.
        rows: most tokens per slice; None: whole layers, whose inputs stay on the device.
        offloads: whether inputs are kept in host memory.
    """

    def __init__(
        self,
        keep_attention: bool,
        keep_experts: int,
        rows: int | None = None,
        offloads: bool = False,
    ):
        self.keep_attention, self.keep_experts, self.rows = keep_attention, keep_experts, rows
        self.inputs = HostInputs() if offloads else DeviceInputs()

    def on_train_begin(self, args, state, control, **kwargs):
        """Replace the plain checkpointing that the trainer has just enabled."""
        base = kwargs["model"].get_base_model()
        if self.rows is not None:
            slice_rows(base, self.rows, self.inputs, self.keep_attention)
        elif args.gradient_checkpointing:
            checkpoint_layers(base, self.keep_attention, self.keep_experts)
