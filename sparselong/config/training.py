"""The config's section `training`: see schema.py."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sparselong.config.keys import Incidental, Section
from sparselong.config.texts import Function, Project
from sparselong.config.values import Fraction, Positive, Scale

Schedule = Literal[
    "cosine",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "cosine_with_restarts",
    "linear",
    "polynomial",
    "rex",
    "one_cycle",
    "inverse_sqrt",
    "warmup_stable_decay",
    "constant",
    "constant_with_warmup",
    "reduce_lr_on_plateau",
    "greedy",
]
"""Schedules of Axolotl, and of transformers under its names."""
Optimizer = Literal["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "lion_8bit"]


class TrainingSection(Section):
    """Optimizer, schedule, checkpoints and logging, under Axolotl's names."""

    num_epochs: Scale = 1.0
    """Number of passes over the training data."""
    max_steps: Positive | None = None
    """Number of optimizer steps; null derives it from `num_epochs`."""
    gradient_accumulation_steps: Positive = 8
    """Micro-batches per optimizer step."""
    learning_rate: Annotated[float, Field(gt=0.0, le=10.0)] = 2e-4
    """Peak learning rate."""
    lr_scheduler: Schedule = "cosine"
    """Learning rate schedule, warm-up included. `reduce_lr_on_plateau` and `greedy` follow the
    validation loss; they and `constant` need `warmup_ratio: 0`. `polynomial` is linear.
    `one_cycle` also moves AdamW's first beta between 0.95 and 0.85."""
    warmup_ratio: Fraction = 0.03
    """Fraction of the steps over which the learning rate rises to its peak."""
    min_lr_ratio: Fraction | None = None
    """Lowest learning rate after warm-up, as a fraction of the peak: required with
    `cosine_with_min_lr`, `cosine_warmup_with_min_lr` and `greedy`; 0 if null with `polynomial`,
    `rex`, `warmup_stable_decay` and `reduce_lr_on_plateau`."""
    lr_cycles: Positive | None = None
    """Number of times that `cosine_with_restarts` falls to zero."""
    lr_decay_ratio: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Fraction of the steps, the last ones, over which `warmup_stable_decay` falls."""
    lr_patience: Positive | None = None
    """Number of evaluations without improvement that `reduce_lr_on_plateau` and `greedy` wait
    before they lower the learning rate, to a tenth and by 5 %; null: 10. `greedy` raises it again
    after as many improvements."""
    weight_decay: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    """Decoupled weight decay of the adapters."""
    optimizer: Optimizer = "adamw_torch_fused"
    """Optimizer, under transformers' name. `adamw_bnb_8bit` keeps 2 bytes of state per trained
    weight instead of 8, `lion_8bit` 1 byte; both need a GPU. Lion moves each weight by the whole
    learning rate, so it needs a lower one than AdamW."""
    sample_packing: bool = True
    """Pack several conversations into each sequence, separated by position ids."""
    gradient_checkpointing: Annotated[bool, Incidental()] = True
    """Recompute each layer in the backward pass instead of keeping its activations."""
    keep_attention: Annotated[Literal["auto", "always", "never"], Incidental()] = "auto"
    """Whether checkpointed layers keep the output of full attention, so that the backward pass does
    not recompute it: 8.25 KiB per token and full-attention layer (20b at 16,384 tokens: 1.5 GiB).
    `auto` keeps it if the predicted peak fits in free GPU memory; log and manifest say which."""
    keep_experts: Annotated[Literal["auto", "always", "never"], Incidental()] = "auto"
    """Whether checkpointed layers keep the experts' gate_up output, so that the backward pass does
    not recompute it: 45 KiB per token and layer (20b at 4,096 tokens per GPU: 4.2 GiB). `always`
    means all layers. `auto` decides after `keep_attention`, which saves more time per byte, and
    keeps it in as many layers as fit, the last ones of the model (20b at 8,192 tokens on 24 GB: 15
    of 24). Nothing is kept if processes share the experts, nor with `slice_rows` or
    `offload_checkpoints`; with `always`, `auto` uses none of the three."""
    slice_rows: Annotated[Literal["auto", "never"] | Positive, Incidental()] = "auto"
    """How many of its tokens a process computes at once in a checkpointed layer, attention aside:
    norms, projections, experts. `never` computes all of them at once. `auto` computes 8,192 if
    fine-tuning would not otherwise fit, even with `offload_checkpoints`; log, 01_health and
    `--dry-run` say so."""
    offload_checkpoints: Annotated[Literal["auto"] | bool, Incidental()] = "auto"
    """Whether the inputs of checkpointed layers wait for the backward pass in page-locked host
    memory: 5.6 KiB per token and layer (20b at 131,072 tokens: 16.9 GiB). The GPU then holds
    those of two layers. `auto` moves them there if fine-tuning would not otherwise fit."""
    logging_steps: Annotated[Positive, Incidental()] = 1
    """Steps between rows of metrics.jsonl; `save_steps` must be a multiple of it."""
    eval_steps: Positive = 50
    """Steps between evaluations on the validation conversations."""
    save_steps: Annotated[Positive, Incidental()] = 50
    """Steps between checkpoints; a multiple of `eval_steps`, which transformers requires for
    loading the best model."""
    save_total_limit: Annotated[Positive, Incidental()] = 3
    """Number of checkpoints to keep; the best one is always kept."""
    early_stopping_patience: Positive | None = None
    """Number of evaluations in a row without a lower validation loss after which training stops;
    null disables it."""
    early_stopping_threshold: Annotated[float, Field(ge=0.0, le=1e6)] = 0.0
    """How far below the lowest validation loss so far, in nats per token, one must be to count as
    lower."""
    loss_target: Scale | None = None
    """Loss in nats per token at which training stops: a validation loss, or a training loss as
    logged, which is a mean over `logging_steps` steps; null disables it."""
    metrics: Annotated[Function | None, Incidental()] = None
    """Function of your own for each evaluation, as `my_metrics.py:function`. It is called as
    `function(predictions, labels)`, two int64 arrays with an entry for each supervised token of the
    validation conversations, in order: the most likely token and the right one. It returns a number
    or a dict of numbers, for metrics.jsonl, trackers and manifest."""
    use_tensorboard: Annotated[bool, Incidental()] = False
    """Also write TensorBoard event files, to `03_finetune/tensorboard`."""
    wandb_project: Annotated[Project | None, Incidental()] = None
    """Also log to this Weights & Biases project, to `03_finetune/wandb`; null disables it. Nothing
    is uploaded unless the environment says WANDB_MODE=online."""
    trackio_project: Annotated[Project | None, Incidental()] = None
    """Also log to this project of trackio, which keeps it on this machine; null disables it."""

    @property
    def tracker_modules(self) -> dict[str, tuple[str, ...]]:
        """Modules that each tracker needs which is asked for, by its key."""
        asked = {
            "use_tensorboard": (self.use_tensorboard, ("tensorboard",)),
            "wandb_project": (self.wandb_project, ("wandb",)),
            "trackio_project": (self.trackio_project, ("trackio", "gradio")),
        }
        return {key: modules for key, (value, modules) in asked.items() if value}

    @property
    def is_8bit(self) -> bool:
        """Whether the optimizer keeps its states in 8 bits, which needs a GPU."""
        return self.optimizer in ("adamw_bnb_8bit", "lion_8bit")
