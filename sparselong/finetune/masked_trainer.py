"""Override transformers' Trainer: data order, loss, checkpoints and communication between ranks.

`MaskedTraining` precedes a Trainer among a class's bases (the plugin combines it with Axolotl's).
It changes:

- the data order (batches.py), so that a run resumed inside an epoch continues exactly;
- the loss, in training and evaluation: every supervised token of a step has the same weight, while
  Axolotl averages the mean losses of micro-batches;
- checkpoints, which also hold masks, scales and counters (state.py), appear whole or not at all,
  and of which only our own are ever removed (checkpoints.py).

With several ranks (processes/world.py) each takes its data rank's batches and its shard of each
sequence. The base class does not know of the other ranks, so all communication is here: the loss's
divisor and the counters are summed over ranks, gradients once per step, logged losses when they are
logged, and only rank 0 writes checkpoints. If ranks share experts, adapters of these are reduced
over the ranks that hold the same ones, count once in the gradient's norm, and are gathered for
checkpoints (gathering.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from sparselong.adapters import MaskedLoraLinear, keep_dtypes, masked_layers, sharded_parameters
from sparselong.errors import StageError
from sparselong.finetune import checkpoints, gathering, state
from sparselong.finetune.batches import Batches, EpochOrder, make_batches, only, take_tokens
from sparselong.finetune.training_run import TrainingRun
from sparselong.finetune.watching import Predictions
from sparselong.memory import SLICE_TOKENS, rows_at_once
from sparselong.model import NAME, document_masks
from sparselong.parallel import (
    Mesh,
    add_losses,
    count_step,
    gradient_norm,
    mean_loss,
    reduce_gradients,
    share_batch,
)
from sparselong.processes import report_progress, tell
from sparselong.processes import world as ranks
from sparselong.runtime import Settings, using

_VALIDATION = "validation batch"


class MaskedTraining(Trainer):
    """The Trainer overrides listed above; a subclass sets `run` and `mesh`.

    Attributes:
        run: the run, whose config applies to every pass.
        mesh: this process's place in the mesh; None if it trains alone.
        writing: the directory in which a checkpoint is being written; None between checkpoints.
        newest: name of the checkpoint that was written or read last.
        predictions: gives evaluations' predictions to the user's function, if there is one.
        whole: what a checkpoint that is being written holds of all ranks' experts; None if ranks
            do not share experts with adapters.
    """

    run: TrainingRun
    mesh: Mesh | None = None
    writing: Path | None = None
    newest: str | None = None
    whole: gathering.Whole | None = None
    args: Any
    model: Any
    processing_class: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # our loss divides by num_items_in_batch
        self.args.save_total_limit = None  # transformers removes any name with checkpoint-N in it
        self.progress = state.Progress()
        self.predictions: Predictions | None = None
        self.bake_only = self.run.is_trained()
        if self.mesh is not None:
            self.progress.data_ranks = self.mesh.data_size

    def settings(self, **changes: Any) -> AbstractContextManager[Settings]:
        """Return the settings block for a pass of the model.

        Evaluations of sequences that training must slice process experts in slices too.
        """
        config = self.run.config
        return using(
            attention_backend=config.attention_backend,
            deterministic=config.deterministic,
            inference_tokens=rows_at_once(config, SLICE_TOKENS),
            **changes,
        )

    @property
    def layers(self) -> dict[str, MaskedLoraLinear]:
        """Masked layers by name."""
        return masked_layers(self.model)

    @property
    def sharded(self) -> dict[str, torch.nn.Parameter]:
        """Trained parameters of which this rank holds a part, by name."""
        return sharded_parameters(self.model)

    def get_train_dataloader(self) -> DataLoader:
        """Return packed or single conversations in an order that depends on seed and epoch."""
        rows: Any = self.train_dataset
        packed = self.args.sample_packing
        capacity, packs = self.args.max_seq_length, self._train_batch_size
        if packed and not self.args.multipack_real_batches:
            capacity, packs = packs * capacity, 1
        seed = self.args.seed
        batches = make_batches(rows.lengths, capacity if packed else None, packs, seed)
        return self._load(rows, batches, self.data_collator, packed, seed)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return all conversations in order, unpacked."""
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        size = self.args.per_device_eval_batch_size
        numbers = range(len(rows))
        batches = [[[row] for row in numbers[at : at + size]] for at in range(0, len(rows), size)]
        return self._load(rows, batches, self.eval_data_collator, False, None)  # type: ignore[attr-defined]

    def create_optimizer(self, *args, **kwargs):
        """Create the optimizer; raise if its states could not be saved whole."""
        if self.run.config.training.optimizer == "adamw_bnb_8bit":
            gathering.check_blocks(self.sharded)
        return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, num_training_steps, optimizer=None):
        """Create the scheduler, with the warmup as a fraction of the exact number of steps."""
        # Until here `warmup_steps` is the fraction: Axolotl only estimates the number of steps.
        self.args.warmup_steps = int(self.args.warmup_steps * num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def _load(
        self, rows: Any, batches: list, collate: Any, packed: bool, seed: int | None
    ) -> DataLoader:
        made = Batches(rows, batches, collate, packed, self.processing_class.pad_token_id)
        place = (self.mesh.data_rank, self.mesh.data_size) if self.mesh else (0, 1)
        return DataLoader(
            made,
            batch_sampler=EpochOrder(len(batches), seed, *place),
            collate_fn=only,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return a step's micro-batches, and its number of supervised tokens over all ranks."""
        batches = list(islice(epoch_iterator, num_batches))
        counts = count_step(batches, self.mesh, sum(map(take_tokens, batches)))
        self.progress.tokens += counts.tokens
        return batches, counts.divisor

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Train on this rank's shard; after the last micro-batch sum gradients over ranks."""
        masked, placed = "attention_mask" in inputs, "position_ids" in inputs
        if self.args.sample_packing and (masked or not placed):
            raise StageError(
                "packed conversations would attend to each other",
                "position ids that restart with each conversation, and no attention mask",
                f"a batch of {', '.join(sorted(inputs))}",
                "pass training.sample_packing=false",
            )
        with self._pass_over(inputs) as shard:
            loss = super().training_step(model, shard, num_items_in_batch)
        if self.mesh is not None and self.accelerator.sync_gradients:
            reduce_gradients(self.model.parameters(), self.mesh, self.sharded.values())
        return loss

    def _clip_grad_norm(self, model):
        if self.mesh is None or not self.sharded:
            return super()._clip_grad_norm(model)
        trained = [p for p in model.parameters() if p.grad is not None]
        norm = gradient_norm(trained, self.mesh, self.sharded.values())
        torch.nn.utils.clip_grads_with_norm_(trained, self.args.max_grad_norm, norm)
        return norm

    @contextmanager
    def _pass_over(self, inputs: Any) -> Iterator[Any]:
        """Yield this rank's shard of a batch, inside the settings block that it requires."""
        shard, changes = share_batch(inputs, self.mesh, self.run.config.heads_k_stride)
        with self.settings(**changes):
            yield shard

    def log(self, *args, **kwargs):
        """Log, after noting the peaks of memory: Axolotl resets them whenever it logs."""
        self.progress.note_peaks()
        super().log(*args, **kwargs)

    def _maybe_log_save_evaluate(self, tr_loss, *args, **kwargs):
        if self.mesh is not None and self.control.should_log:
            tr_loss.copy_(add_losses(tr_loss, self.mesh))
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        if "position_ids" in inputs and "attention_mask" not in inputs:
            base = self.model.get_base_model()
            if base.config._attn_implementation != NAME:  # ours uses the position ids
                dtype = base.get_input_embeddings().weight.dtype
                masks = document_masks(base.config, inputs["position_ids"], dtype)
                inputs["attention_mask"] = masks
        return inputs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the loss, and raise if it needed the logits of whole sequences."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if outputs.logits is not None:
            raise StageError(
                "the loss was computed from the logits of whole sequences",
                "the chunked loss, which the plugin attaches to the model",
                f"logits {list(outputs.logits.shape)}",
                "use the package versions of install.sh: another version replaced the loss",
            )
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """Evaluate the mean loss per supervised token."""
        self.model.eval()
        with ExitStack() as stack:
            if self.predictions is not None:
                stack.enter_context(self.predictions.catching(self.model.get_base_model()))
            loss = mean_loss(self._measure_all(dataloader), self.mesh)
        if self.predictions is not None:
            self.predictions.finish()
        metrics = {f"{metric_key_prefix}_loss": loss}
        return EvalLoopOutput(None, None, metrics, len(dataloader.dataset.rows))  # type: ignore[arg-type]

    def _measure_all(self, dataloader: DataLoader) -> Iterator[tuple[torch.Tensor, Any]]:
        """Yield what `_measure` returns for each batch, and show how far the evaluation is."""
        report_progress(_VALIDATION, 0, len(dataloader))
        for number, batch in enumerate(dataloader, 1):
            yield self._measure(batch)
            report_progress(_VALIDATION, number, len(dataloader))

    def _measure(self, batch: Any) -> tuple[torch.Tensor, Any]:
        """Return the sum of token losses over this rank's shard of a batch, and the shard."""
        take_tokens(batch)
        with self._pass_over(batch) as shard:
            inputs = self._prepare_inputs(shard)
            loss: Any = self.compute_loss(self.model, inputs, num_items_in_batch=1)
            if self.predictions is not None:
                shape, head = tuple(batch["input_ids"].shape), self.model.get_output_embeddings()
                self.predictions.add(head, inputs, shape, self.mesh)
            return loss, inputs

    def _init_training_state(self, max_steps, *args, **kwargs):
        epochs_and_steps = super()._init_training_state(max_steps, *args, **kwargs)
        # A resumed state has the intervals of the checkpoint's config, which may differ.
        self.state.compute_steps(self.args, max_steps)
        self._settle_best()
        return epochs_and_steps

    def _run_epoch(self, **kwargs):
        # If resumed after its last step, the loop would take one extra step; or many, if stopped.
        is_over = self.progress.stopped or self.state.global_step >= self.state.max_steps
        if self.bake_only or is_over:
            self.control.should_training_stop = True
            return
        kwargs["train_dataloader"].batch_sampler.set_epoch(kwargs["epoch"])
        super()._run_epoch(**kwargs)

    def _save_checkpoint(self, model, trial):
        sharded = self.sharded
        ranks.check_replicas(self.trained(), self.state.global_step, sharded)
        if self.mesh is not None and sharded:  # before rank 0 writes anything
            self.whole = gathering.gather_whole(self.model, self.optimizer, self.mesh)
        if ranks.is_first():
            self._write_checkpoint(model, trial)
        self.whole = None
        (best, *_) = ranks.collect(self.state.best_model_checkpoint)
        self.state.best_model_checkpoint = best

    def _get_output_dir(self, trial):
        return str(self.writing or self.run.checkpoints)

    def _write_checkpoint(self, model, trial) -> None:
        """Write a checkpoint that appears whole under its name, and remove the oldest ones."""
        folder, step = self.run.checkpoints, self.state.global_step
        self.writing = checkpoints.begin(folder)
        try:
            super()._save_checkpoint(model, trial)
            made = self.writing / f"checkpoint-{step}"
        finally:
            self.writing = None
        if self.state.best_global_step == step:  # transformers has noted the temporary path
            self.state.best_model_checkpoint = str(folder / made.name)
            self.state.save_to_json(str(made / checkpoints.TRAINER_STATE))
        checkpoints.seal(made)
        self.newest = made.name
        aside = checkpoints.publish(made, folder)
        if aside is not None:
            tell(f"{made.name} was in the way of the new one and is now {aside.name}")
        keep = {made.name, Path(self.state.best_model_checkpoint or made).name}
        limit = self.run.config.training.save_total_limit
        for path, reason in checkpoints.remove_oldest(folder, limit, keep).items():
            tell(f"{path.name} is older than the newest {limit} but was not removed: {reason}")

    def _settle_best(self) -> None:
        """Replace a best checkpoint that is damaged or gone by the best one that is whole."""
        if self.state.best_model_checkpoint is None:
            return
        (found, *_) = ranks.collect(self._find_best() if ranks.is_first() else None)
        step, self.state.best_metric = found or (None, None)
        self.state.best_global_step = step
        place = None if step is None else str(self.run.checkpoints / f"checkpoint-{step}")
        self.state.best_model_checkpoint = place

    def _find_best(self) -> tuple[int, float] | None:
        """Return step and validation loss of the best whole checkpoint, None if there is none."""
        folder = self.run.checkpoints  # not the recorded folder: the run may have been moved
        recorded = folder / Path(self.state.best_model_checkpoint or "").name
        fault = checkpoints.find_fault(recorded)
        step = checkpoints.step_of(recorded)
        if fault is None and step is not None and self.state.best_metric is not None:
            return step, self.state.best_metric
        rows = [row for row in self.state.log_history if "eval_loss" in row]
        losses = {int(row["step"]): float(row["eval_loss"]) for row in rows}
        found = checkpoints.find_best(folder, losses)
        step = checkpoints.step_of(found) if found else None
        other = "none of the others is whole"
        if step is not None:
            other = f"checkpoint-{step} (validation loss {losses[step]:.4f}) takes its place"
        tell(f"the best checkpoint, {recorded.name}, cannot be used: {fault}; {other}")
        return None if step is None else (step, losses[step])

    def trained(self) -> dict[str, torch.Tensor]:
        """Return what training changes: trained parameters, masks and scales."""
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        return trained | state.buffers(self.layers)

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, self.whole.model if self.whole else state_dict)
        directory = Path(output_dir or str(self.args.output_dir))
        if checkpoints.step_of(directory) is not None:
            state.write(directory, self.layers, self.progress)

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.whole is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        torch.save(self.whole.optimizer, Path(output_dir) / checkpoints.OPTIMIZER)
        torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / checkpoints.SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or self.mesh is None or not self.sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            folder, optimizer = Path(checkpoint), self.optimizer
            options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
            whole = torch.load(folder / checkpoints.OPTIMIZER, mmap=True, **options)
            optimizer.load_state_dict(gathering.cut_states(whole, self.model, optimizer, self.mesh))
            self.lr_scheduler.load_state_dict(torch.load(folder / checkpoints.SCHEDULER, **options))
        if checkpoint is not None:
            gathering.check_states(self.optimizer, Path(checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._restore(Path(resume_from_checkpoint))
        self.newest = Path(resume_from_checkpoint).name

    def _load_best_model(self):
        self._settle_best()
        if self.state.best_model_checkpoint is None:
            return  # the plugin refuses to bake
        super()._load_best_model()
        counters = vars(self.progress).copy()
        self._restore(Path(str(self.state.best_model_checkpoint)))
        vars(self.progress).update(counters)  # only the weights go back, not the run's counters

    def _restore(self, directory: Path) -> None:
        keep_dtypes(self.model)
        stored = state.read(directory, self.layers, self.progress.data_ranks)
        vars(self.progress).update(vars(stored))
