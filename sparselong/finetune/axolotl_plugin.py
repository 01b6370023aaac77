"""Our Axolotl plugin: everything goes through its hooks, and only this file imports axolotl.

| hook                         | what we do there                                                  |
|------------------------------|-------------------------------------------------------------------|
| `register`                   | open the run; report expected failures in failure.json            |
| `load_datasets`              | the encoded conversations; show and count supervised tokens       |
| `pre_model_load`             | experts in host memory, if they belong there                      |
| `pre_lora_load`              | refuse embeddings that Axolotl has resized                        |
| `get_adapter_capabilities`,  | our adapter: masked LoRA layers over stage 02's packed layers and |
| `load_adapter`               | masters, built through PEFT's registry of custom modules          |
| `get_trainer_cls`            | Axolotl's trainer with our data order, loss and checkpoints       |
| `get_training_args`          | show NaN losses, set the number of steps                          |
| `add_callbacks_post_trainer` | mask upkeep, recomputation, router watch, metrics and stopping    |
| `post_trainer_create`        | receipt.json: what was replaced and attached                      |
| `post_train`                 | bake the best checkpoint; write the adapter and baked.json        |

The model itself needs no hook: Axolotl loads `02_compress/model` with AutoModelForCausalLM, and our
quantizer (registered by `import sparselong`) inserts the packed modules. axolotl.yaml names the run
directory; all our values are read from the run's config.yaml (training_run.py).

If a plugin fails to import, Axolotl only logs it and trains without the plugin. The stage therefore
checks the receipt afterwards and fails without it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from axolotl.common.datasets import TrainDatasetMeta
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from pydantic import BaseModel
from transformers import TrainerCallback

import sparselong
from sparselong.adapters import (
    ExtraAdapters,
    Masters,
    add_masked_lora,
    bake_checkpoint,
    count_trainable,
    name_adapter,
    parameter_table,
    put_baked_experts,
    tuned_layers,
)
from sparselong.data import encode_files, select_usable
from sparselong.errors import StageError
from sparselong.files import write_atomically
from sparselong.finetune import checkpoints, state
from sparselong.finetune.axolotl_config import ADAPTER, attention_of
from sparselong.finetune.callbacks import MaskUpkeep, Recomputation
from sparselong.finetune.gathering import gather_model
from sparselong.finetune.keeping import Keeping, decide_keeping
from sparselong.finetune.masked_trainer import MaskedTraining
from sparselong.finetune.routers import RouterWatch
from sparselong.finetune.supervision import LabelledRows, preview
from sparselong.finetune.training_run import (
    BAKED,
    METRICS,
    RECEIPT,
    RUN_KEY,
    SUPERVISION,
    TRAINED,
    TrainingRun,
)
from sparselong.finetune.watching import Clock, Metrics, Predictions, Stopping, open_trackers
from sparselong.memory import describe_layers, rows_at_once
from sparselong.model import (
    FusedDecoderLayer,
    check_rows_kept,
    check_unchanged,
    chunk_loss,
    describe_placement,
    describe_weights,
    find_host_experts,
    load_tokenizer,
    two_four_conforming,
)
from sparselong.processes import (
    Sharing,
    decide_sharing,
    decided_sharing,
    joined_rank,
    tell,
    tell_failures,
)
from sparselong.processes import world as ranks
from sparselong.runtime import current, using

_PREVIEW_ROWS = 3
_ADAPTER_FILE = "adapter_model.safetensors"
_PACKAGES = ("axolotl", "transformers", "peft", "torch", "accelerate", "datasets")


class SparseLongArgs(BaseModel):
    """Keys that the plugin adds to Axolotl's schema."""

    sparselong_run: str  # RUN_KEY


class MaskedTrainer(MaskedTraining, AxolotlTrainer):
    """Axolotl's trainer with our data order, loss and checkpoints (masked_trainer.py)."""


class SparseLongPlugin(BasePlugin):
    """The hooks listed in the module's docstring."""

    run: TrainingRun  # from `register`, the first hook
    sharing: Sharing

    def __init__(self):
        super().__init__()
        self.trainer: MaskedTrainer | None = None
        self.keeping: dict[str, Keeping] = {}
        self.recomputation = Recomputation(False, 0)
        self.supervised_token_fraction = 0.0
        self.opening = ExitStack()
        self.frozen: dict[str, str] = {}
        self.done = False

    def register(self, cfg):
        """Open the run and report expected failures."""
        self.run = TrainingRun.open(Path(cfg[RUN_KEY]))
        sharing = decided_sharing()
        if ranks.mesh() is not None and sharing is not None:  # rank.py has told failures
            self._begin(sharing)
            return
        if joined_rank() is not None:
            raise StageError(
                "several processes would train independently of each other",
                "03_finetune.py started by torchrun, which shards sequences over the processes",
                "Axolotl started directly by torchrun or accelerate",
                "torchrun --nproc_per_node=N 03_finetune.py ...",
            )
        tell_failures(self.run.work)
        self._begin(decide_sharing(self.run.config))

    def _begin(self, sharing: Sharing) -> None:
        """Train as was decided, instead of by `auto`."""
        assert sharing.layers is not None, "decided for stage 03"
        self.sharing = sharing
        self.run = replace(self.run, config=sharing.layers.settle(self.run.config))

    def get_input_args(self):
        """Return the schema of our keys."""
        return f"{__name__}.SparseLongArgs"

    def get_adapter_capabilities(self):
        """Declare our adapter."""
        return [AdapterCapabilities(name=ADAPTER, lora_like=True)]

    def get_trainer_cls(self, cfg):
        """Return our trainer class for this run and rank."""
        return type(
            MaskedTrainer.__name__, (MaskedTrainer,), {"run": self.run, "mesh": ranks.mesh()}
        )

    def get_training_args(self, cfg):
        """Return the training arguments that Axolotl must not choose."""
        return {
            "logging_nan_inf_filter": False,
            "eval_on_start": not cfg.resume_from_checkpoint,  # the curve begins at stage 02's model
            "disable_tqdm": True,
            "dataloader_pin_memory": torch.cuda.is_available(),
            # Axolotl would estimate the number of steps from its own sampler, which is not used.
            "max_steps": cfg.max_steps or -1,
            "warmup_steps": cfg.warmup_ratio,
        }

    def load_datasets(self, cfg, preprocess=False):
        """Return the encoded conversations, which Axolotl's own loaders never open."""
        # Axolotl's schema accepts only its own names; this is the first hook after validation.
        cfg.attn_implementation = attention_of(self.run.config)
        config, tokenizer = self.run.config, load_tokenizer(self.run.compressed)
        with ranks.first_alone():  # the stage has encoded them, unless the files were lost
            encoded = encode_files(config, self.run.directory, tokenizer)
        usable = select_usable(encoded, config.sequence_len)
        train = LabelledRows(encoded.train, usable.train, config.seed)
        validation = LabelledRows(encoded.validation, usable.validation, config.seed)
        text = preview([train[row] for row in range(min(_PREVIEW_ROWS, len(train)))], tokenizer)
        if ranks.is_first():
            write_atomically(self.run.work / SUPERVISION, text)
        self.supervised_token_fraction = train.supervised_fraction
        tell(f"{text}{self.supervised_token_fraction:.1%} of the tokens are supervised")
        meta: Any = TrainDatasetMeta  # declared for datasets.Dataset, whose methods are not used
        return meta(train, validation)

    def pre_model_load(self, cfg):
        """Let the model be opened with its experts where they belong; `load_adapter` ends it."""
        self.opening.enter_context(using(expert_placement=self.sharing.placement))

    def pre_lora_load(self, cfg, model):
        """Raise if Axolotl has resized the embeddings."""
        embeddings: Any = model.get_input_embeddings()
        check_rows_kept(embeddings.num_embeddings, self.run.compressed)

    def load_adapter(self, model, cfg, inference=False, config_only=False):
        """Return the model with our adapters, and their PEFT config."""
        self.opening.close()
        host = find_host_experts(model)
        self.frozen = host.hash_tensors() if host else {}
        tell(describe_weights(model))
        tell(f"expert_parallel_degree {self.sharing}")
        tell(f"checkpointed layers: {describe_layers(self.run.config)}")
        chunk_loss(model)
        lora = self.run.config.lora
        tuned, config = add_masked_lora(
            model,
            targets=list(lora.target_modules),
            r=lora.r,
            alpha=lora.alpha,
            master_of=Masters(self.run.masters).read,
            seed=self.run.config.seed,
            extra=ExtraAdapters(
                lora.expert_targets,
                lora.expert_r,
                lora.router,
                getattr(torch, lora.expert_dtype),
            ),
        )
        tell(parameter_table(tuned))
        return tuned, config

    def add_callbacks_post_trainer(self, cfg, trainer: Any):
        """Return our callbacks."""
        config, device = self.run.config, "cuda" if torch.cuda.is_available() else "cpu"
        self.keeping = decide_keeping(config, device, self.sharing.held)
        rows = rows_at_once(config, config.micro_batch_size * config.sequence_len)
        upkeep = config.finetuning_modifiers.MagnitudePruningModifier
        for key, decision in self.keeping.items():
            tell(f"{key} {decision}")
        self.recomputation = Recomputation(
            keep_attention=self.keeping["keep_attention"].kept > 0,
            keep_experts=self.keeping["keep_experts"].kept,
            rows=rows,
            offloads=config.training.offload_checkpoints is True,
        )
        frequency, criterion = upkeep.update_frequency, upkeep.criterion
        masks = MaskUpkeep(trainer.layers, trainer.progress, frequency, criterion)
        return [masks, self.recomputation, RouterWatch(trainer.model), *self._watch(trainer, masks)]

    def _watch(self, trainer: MaskedTrainer, masks: MaskUpkeep) -> list[TrainerCallback]:
        """Return the callbacks that record the run, and end it early."""
        training, progress = self.run.config.training, trainer.progress
        if training.metrics is not None:
            trainer.predictions = Predictions(training.metrics)
        path, trackers = self.run.work / METRICS, partial(open_trackers, self.run)
        metrics = Metrics(
            path if ranks.is_first() else None,
            progress,
            masks.next_step,
            trackers,
            trainer.predictions,
        )
        patience, threshold = training.early_stopping_patience, training.early_stopping_threshold
        clock = Clock(self.run.work if ranks.is_first() else None)
        stopping = Stopping(progress, training.loss_target, patience, threshold)
        return [metrics, stopping, clock]

    def post_trainer_create(self, cfg, trainer: Any):
        """Write receipt.json."""
        self.trainer = trainer
        if not ranks.is_first():
            return
        with trainer.settings():  # the effective values, not the config's
            settings = current()
        shared = asdict(self.sharing)
        receipt = {
            "plugin": f"{__name__}.{type(self).__name__}",
            "modules_replaced": sorted(tuned_layers(trainer.model)),
            "callbacks": [type(c).__name__ for c in trainer.callback_handler.callbacks],
            "trainer": type(trainer).__name__,
            "attention": trainer.model.get_base_model().config._attn_implementation,
            "fused_layers": sum(isinstance(m, FusedDecoderLayer) for m in trainer.model.modules()),
            "attention_backend": settings.attention_backend,
            "deterministic": settings.deterministic,
            "expert_parallel_degree": shared,
            "layers": shared.pop("layers"),
            **{key: asdict(decision) for key, decision in self.keeping.items()},
            "processes": ranks.count(),
            "trainable_parameters": count_trainable(trainer.model),
            "supervised_token_fraction": self.supervised_token_fraction,
            "total_steps": trainer.args.max_steps,
            "versions": {
                "sparselong": sparselong.__version__,
                **{name: importlib.metadata.version(name) for name in _PACKAGES},
            },
            "process": os.getpid(),
        }
        write_atomically(self.run.work / RECEIPT, json.dumps(receipt, indent=1) + "\n")

    def post_train(self, cfg, model):
        """Bake the best checkpoint, and write the adapter and baked.json."""
        if self.trainer is None:
            return
        if self.done:  # Axolotl calls this hook twice, the second time after it has saved itself
            if self.trainer.sharded:  # this rank's experts only, which nobody should take for all
                (self.run.axolotl / _ADAPTER_FILE).unlink(missing_ok=True)
            return
        self.done = True
        trainer, work = self.trainer, self.run.work
        best = trainer.state.best_model_checkpoint
        if best is None:
            raise StageError(
                "there is no best checkpoint",
                "a whole checkpoint of a step that was evaluated with a finite loss",
                "none",
                "check the validation conversations and training.eval_steps; if log.txt says that "
                "a checkpoint is damaged, train again: python 03_finetune.py --force",
            )
        outcome = self._describe_training(trainer, Path(best))
        if ranks.is_first():
            write_atomically(work / TRAINED, json.dumps({"newest": trainer.newest}) + "\n")
            tell(f"baking {Path(best).name} (validation loss {trainer.state.best_metric:.4f})")
        layers = tuned_layers(trainer.model)
        baked, rounding = bake_checkpoint(self.run.compressed, layers, work / "model")
        self._write_adapter(trainer)
        if ranks.is_first():
            outcome["two_four_conforming"] = two_four_conforming(baked)
        if rounding:  # the best loss was measured before rounding
            put_baked_experts(baked, layers)
            with torch.no_grad():
                loader = trainer.get_eval_dataloader()
                evaluated = trainer.evaluation_loop(loader, "baked experts")
            outcome["expert_rounding"] = rounding
            loss = outcome["baked_eval_loss"] = evaluated.metrics["eval_loss"]
            if trainer.predictions is not None:
                outcome["baked_metrics"] = trainer.predictions.figures
            tell(f"experts rounded to MXFP4 again: validation loss is now {loss:.4f}")
        if ranks.is_first():
            outcome["files"] = self.run.describe_result()
            write_atomically(work / BAKED, json.dumps(outcome, indent=1) + "\n")
        ranks.leave()

    def _describe_training(self, trainer: MaskedTrainer, best: Path) -> dict[str, Any]:
        """Return what baked.json says of the training; collective."""
        return {
            "best_checkpoint": best.name,
            "best_step": checkpoints.step_of(best),
            "best_eval_loss": trainer.state.best_metric,
            "steps": trainer.state.global_step,
            "stopped": trainer.progress.stopped or {"reason": "all steps are done"},
            "mask_updates": trainer.progress.mask_updates,
            "peak_bytes": ranks.merge_peaks(trainer.progress.note_peaks()),
            "experts": self._check_experts(trainer),
            "copied_input_bytes": ranks.collect(self.recomputation.inputs.copied_bytes),
        }

    def _check_experts(self, trainer: MaskedTrainer) -> dict[str, Any]:
        """Return where the experts are, with a receipt if that is the host; collective."""
        experts = describe_placement(trainer.model, ranks.collect)
        host = find_host_experts(trainer.model)
        if host is not None:
            experts["frozen"] = ranks.collect(check_unchanged(host, self.frozen))
        return experts

    def _write_adapter(self, trainer: MaskedTrainer) -> None:
        """Write the adapter with all experts; every rank calls this."""
        whole, folder = None, self.run.work / "adapter"
        if trainer.mesh is not None and trainer.sharded:
            whole = gather_model(trainer.model, trainer.mesh)
        if ranks.is_first():
            trainer.model.save_pretrained(str(folder), state_dict=whole)
            state.write(folder, trainer.layers, trainer.progress)
            name_adapter(folder, self.run.compressed_name)
