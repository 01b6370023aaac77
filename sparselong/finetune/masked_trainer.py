"""Training as transformers' Trainer does it, but for the data's order, the loss and checkpoints.

`MaskedTraining` goes before a Trainer in a class's bases (the plugin joins it to Axolotl's). Ours:

- the order of the data (batches.py), so that a run that goes on inside an epoch goes on exactly;
- the loss, in training and evaluation alike: a token weighs the same wherever it stands. Axolotl
  averages the micro-batches' mean losses;
- checkpoints hold masks, scales and counters (state.py).

With several ranks (processes/world.py) each takes the batches of its data rank and, of each batch,
its shard of the sequence. The base class knows nothing of the others, so what crosses ranks is
here: the divisor of the loss and the counters are those of all ranks, gradients are added over them
once a step, logged losses are the sums of all shares, and only rank 0 writes checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput

from sparselong.adapters import MaskedLoraLinear, masked_layers
from sparselong.errors import StageError
from sparselong.finetune import state
from sparselong.finetune.batches import IGNORED, Batches, EpochOrder, make_batches, only
from sparselong.finetune.training_run import TrainingRun
from sparselong.model import NAME, document_masks
from sparselong.parallel import add_losses, reduce_gradients, sum_over_ranks
from sparselong.parallel.sequence import context_parallel, shard_batch, take_layout
from sparselong.processes import world as ranks


class MaskedTraining(Trainer):
    """See the module's text. A subclass names its run: the base class makes the arguments."""

    run: TrainingRun
    args: Any
    model: Any
    processing_class: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # the loss divides by num_items_in_batch itself
        self.progress = state.Progress()
        self.bake_only = self.run.is_trained()
        self.mesh = ranks.mesh()
        if self.mesh is not None:
            self.progress.data_ranks = self.mesh.data_size

    @property
    def layers(self) -> dict[str, MaskedLoraLinear]:
        """The masked layers by name."""
        return masked_layers(self.model)

    def get_train_dataloader(self) -> DataLoader:
        """Packed or single conversations in an order that seed and epoch decide."""
        packed, rows = self.args.sample_packing, self.train_dataset
        lengths = [len(tokens) for tokens in rows["input_ids"]]  # type: ignore[index]
        capacity, packs = self.args.max_seq_length, self._train_batch_size
        if packed and not self.args.multipack_real_batches:
            capacity, packs = packs * capacity, 1
        seed = self.args.seed
        batches = make_batches(lengths, capacity if packed else None, packs, seed)
        return self._load(rows, batches, self.data_collator, packed, seed)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Conversations one by one and in order, none left out."""
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        size = self.args.per_device_eval_batch_size
        numbers = range(len(rows))
        batches = [[[row] for row in numbers[at : at + size]] for at in range(0, len(rows), size)]
        return self._load(rows, batches, self.eval_data_collator, False, None)  # type: ignore[attr-defined]

    def create_scheduler(self, num_training_steps, optimizer=None):
        # A share of the steps, as Axolotl knows only an estimate of their number.
        self.args.warmup_steps = int(self.args.warmup_steps * num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def _load(
        self, rows: Any, batches: list, collate: Any, packed: bool, seed: int | None
    ) -> DataLoader:
        columns = ["input_ids", "labels", "position_ids" if packed else "attention_mask"]
        made = Batches(
            rows.select_columns(columns),
            batches,
            collate,
            packed,
            self.processing_class.pad_token_id,
        )
        place = (self.mesh.data_rank, self.mesh.data_size) if self.mesh else (0, 1)
        return DataLoader(
            made,
            batch_sampler=EpochOrder(len(batches), seed, *place),
            collate_fn=only,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """A step's micro-batches, and how many tokens all ranks learn from in it."""
        batches = list(islice(epoch_iterator, num_batches))
        counts = torch.tensor([[self._count_tokens(b), _count_labels(b)] for b in batches]).sum(0)
        if self.mesh is not None:
            counts = sum_over_ranks(counts, self.mesh.data_group, "token count")
        self.progress.tokens += int(counts[0])
        return batches, max(int(counts[1]), 1)

    def _count_tokens(self, batch: Any) -> int:
        if "attention_mask" in batch:
            return int(batch["attention_mask"].sum())
        return int((batch["input_ids"] != self.processing_class.pad_token_id).sum())

    def training_step(self, model, inputs, num_items_in_batch=None):
        masked, placed = "attention_mask" in inputs, "position_ids" in inputs
        if self.args.sample_packing and (masked or not placed):
            raise StageError(
                "packed conversations would attend to each other",
                "position ids that start anew with each conversation, and no attention mask",
                f"a batch of {', '.join(sorted(inputs))}",
                "pass training.sample_packing=false",
            )
        with self._sharded(inputs) as shard:
            loss = super().training_step(model, shard, num_items_in_batch)
        if self.mesh is not None and self.accelerator.sync_gradients:
            reduce_gradients(self.model.parameters(), self.mesh)
        return loss

    @contextmanager
    def _sharded(self, inputs: Any) -> Iterator[dict[str, torch.Tensor]]:
        """This rank's share of a batch, and inside the block attention to the others' shares."""
        if self.mesh is None or self.mesh.context_size == 1:
            yield inputs
            return
        shard = shard_batch(dict(inputs), self.mesh)
        layout = take_layout(shard, self.run.config.heads_k_stride)
        with context_parallel(self.mesh, layout):
            yield shard

    def _maybe_log_save_evaluate(self, tr_loss, *args, **kwargs):
        if self.mesh is not None and self.control.should_log:
            tr_loss.copy_(add_losses(tr_loss, self.mesh))
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        if "position_ids" in inputs and "attention_mask" not in inputs:
            base = self.model.get_base_model()
            if base.config._attn_implementation != NAME:  # ours goes by the position ids
                dtype = base.get_input_embeddings().weight.dtype
                masks = document_masks(base.config, inputs["position_ids"], dtype)
                inputs["attention_mask"] = masks
        return inputs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if outputs.logits is not None:
            raise StageError(
                "the loss was computed from the logits of whole sequences",
                "the loss in chunks, which the plugin puts into the model",
                f"logits {list(outputs.logits.shape)}",
                "use the package versions that install.sh installs; another one has replaced it",
            )
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64)
        for batch in dataloader:
            with self._sharded(batch) as shard:
                inputs = self._prepare_inputs(shard)
                loss: Any = self.compute_loss(self.model, inputs, num_items_in_batch=1)
            sums += torch.tensor([float(loss), _count_labels(inputs), len(inputs["labels"])])
        if self.mesh is not None:
            sums = sum_over_ranks(sums, self.mesh.world_group, "evaluation")
        total, predicted, rows = sums.tolist()
        mean = total / predicted if predicted else math.nan
        return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": mean}, int(rows))  # type: ignore[arg-type]

    def _init_training_state(self, max_steps, *args, **kwargs):
        epochs_and_steps = super()._init_training_state(max_steps, *args, **kwargs)
        # A checkpoint brings the intervals of the config that it was written with.
        self.state.compute_steps(self.args, max_steps)
        return epochs_and_steps

    def _run_epoch(self, **kwargs):
        # Resumed behind its last step, the loop would take one step more.
        if self.bake_only or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        kwargs["train_dataloader"].batch_sampler.set_epoch(kwargs["epoch"])
        super()._run_epoch(**kwargs)

    def _save_checkpoint(self, model, trial):
        ranks.check_replicas(self.replicated(), self.state.global_step)
        if ranks.is_first():
            super()._save_checkpoint(model, trial)
        (best, *_) = ranks.collect(self.state.best_model_checkpoint)
        self.state.best_model_checkpoint = best

    def replicated(self) -> dict[str, torch.Tensor]:
        """What every rank must hold alike: trained parameters, masks and scales, by name."""
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        return trained | state.buffers(self.layers)

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        directory = Path(output_dir or str(self.args.output_dir))
        if directory.name.startswith(PREFIX_CHECKPOINT_DIR):
            state.write(directory, self.layers, self.progress)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._restore(Path(resume_from_checkpoint))

    def _load_best_model(self):
        super()._load_best_model()
        counters = vars(self.progress).copy()
        self._restore(Path(str(self.state.best_model_checkpoint)))
        vars(self.progress).update(counters)  # the run's history does not go back with the weights

    def _restore(self, directory: Path) -> None:
        stored = state.read(directory, self.layers, self.progress.data_ranks)
        vars(self.progress).update(vars(stored))


def _count_labels(batch: Any) -> int:
    """Tokens that are learned or measured in a batch, or in a shard of one."""
    labels = batch["shift_labels"] if "shift_labels" in batch else batch["labels"][:, 1:]
    return int((labels != IGNORED).sum())
