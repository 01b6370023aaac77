"""Our side of Axolotl, through its plugin hooks only; the one file that imports axolotl.

| hook                         | what we do there                                                  |
|------------------------------|-------------------------------------------------------------------|
| `register`                   | expected failures are told to the stage's process (failure.json)  |
| `load_datasets`              | Axolotl's own loader, our labels; show and count what is learned  |
| `get_adapter_capabilities`,  | our adapter: masked LoRA layers built through PEFT's registry of  |
| `load_adapter`               | custom modules over stage 02's packed layers and masters          |
| `get_trainer_cls`            | Axolotl's trainer with our data order, loss, checkpoints          |
| `get_training_args`          | a NaN loss must show; early stopping survives a restart; steps    |
| `add_callbacks_post_trainer` | mask upkeep and metrics                                           |
| `post_trainer_create`        | receipt.json: what was replaced and attached                      |
| `post_train`                 | bake the best checkpoint, write the adapter and baked.json        |

The model itself needs no hook: Axolotl opens `02_compress/model` by AutoModelForCausalLM, and our
quantizer (registered by `import sparselong`) puts the packed modules in place.

Axolotl only logs a plugin that fails to import, and trains without it. So the stage asks for the
receipt afterwards and fails without it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from axolotl.cli.args import TrainerCliArgs
from axolotl.common.datasets import load_datasets
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from axolotl.loaders import load_tokenizer
from pydantic import BaseModel

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
from sparselong.checkpoint import Checkpoint
from sparselong.errors import StageError
from sparselong.files import write_atomically
from sparselong.finetune import state, supervision
from sparselong.finetune.axolotl_config import (
    ADAPTER,
    BAKED,
    CHECKPOINTS,
    METRICS,
    RECEIPT,
    SUPERVISION,
    TRAINED,
)
from sparselong.finetune.callbacks import MaskUpkeep, Metrics, SecondPasses, tell
from sparselong.finetune.keeping import Keeping, decide_keeping
from sparselong.finetune.masked_trainer import MaskedTraining
from sparselong.finetune.routers import RouterWatch
from sparselong.model import (
    FusedDecoderLayer,
    chunk_loss,
    describe_weights,
    two_four_conforming,
)
from sparselong.processes import joined_rank, tell_failures
from sparselong.processes import world as ranks
from sparselong.runtime import current

_PREVIEW_ROWS = 3
_PACKAGES = ("axolotl", "transformers", "peft", "torch", "accelerate", "datasets")


class SparseLongSection(BaseModel):
    """The `sparselong:` section of the generated YAML."""

    masters: str
    work: str
    name: str
    attention: str
    attention_backend: str
    deterministic: bool
    heads_k_stride: int
    expert_targets: tuple[str, ...] = ()
    expert_r: int | None = None
    router: bool = False
    update_frequency: float
    criterion: Literal["hysteresis", "magnitude"]
    keep_attention: Literal["auto", "always", "never"]
    keep_experts: Literal["auto", "always", "never"]
    kept_peak_bytes: dict[str, int]
    nothing_to_keep: dict[str, str]
    train_on: Literal["assistant", "all"]
    loss_target: float | None = None
    bake_only: bool = False


class SparseLongArgs(BaseModel):
    """What the plugin adds to Axolotl's schema."""

    sparselong: SparseLongSection


class MaskedTrainer(MaskedTraining, AxolotlTrainer):
    """Axolotl's trainer with our order of the data, loss and checkpoints (masked_trainer.py)."""


class SparseLongPlugin(BasePlugin):
    """See the table in the module's text."""

    def __init__(self):
        super().__init__()
        self.trainer: MaskedTrainer | None = None
        self.keeping: dict[str, Keeping] = {}
        self.supervised_token_fraction = 0.0
        self.done = False

    def register(self, cfg):
        if ranks.mesh() is not None:
            return  # rank.py has seen to it
        if joined_rank() is not None:
            raise StageError(
                "several processes train without knowing of each other",
                "torchrun starting 03_finetune.py, which splits sequences as this project does",
                "Axolotl started directly by torchrun or accelerate",
                "torchrun --nproc_per_node=N 03_finetune.py ...",
            )
        tell_failures(Path(cfg["sparselong"]["work"]))

    def get_input_args(self):
        return f"{__name__}.SparseLongArgs"

    def get_adapter_capabilities(self):
        return [AdapterCapabilities(name=ADAPTER, lora_like=True)]

    def get_trainer_cls(self, cfg):
        return MaskedTrainer

    def get_training_args(self, cfg):
        return {
            # Where checkpoints are, also for a rank whose Axolotl has a folder of its own.
            "output_dir": str(Path(cfg.sparselong.work) / CHECKPOINTS),
            "logging_nan_inf_filter": False,
            "restore_callback_states_from_checkpoint": True,
            "eval_on_start": not cfg.resume_from_checkpoint,  # the curve begins at stage 02's model
            "disable_tqdm": True,
            "dataloader_pin_memory": torch.cuda.is_available(),
            # Axolotl estimates the number of steps from its own sampler, which is not in use.
            "max_steps": cfg.max_steps or -1,
            "warmup_steps": cfg.warmup_ratio,
        }

    def load_datasets(self, cfg, preprocess=False):
        with ranks.first_alone():  # the others find what it has prepared
            return self._load_datasets(cfg)

    def _load_datasets(self, cfg):
        # Axolotl's schema knows its own names only, and this hook is the first after it.
        cfg.attn_implementation = cfg.sparselong.attention
        try:
            meta: Any = load_datasets(cfg=cfg, cli_args=TrainerCliArgs())
        except ValueError as error:
            raise StageError(
                "the conversations cannot be trained on",
                "rows that fit into sequence_len and have supervised tokens",
                str(error),
                "raise sequence_len, or check the rows' roles and data.train_on",
            ) from error
        tokenizer = load_tokenizer(cfg)
        for name, rows in (("train", cfg.datasets), ("eval", cfg.test_datasets)):
            dataset, source = getattr(meta, f"{name}_dataset"), Path(rows[0]["path"])
            self._tell_dropped(name, dataset, source)
            labelled = supervision.relabel(dataset, source, tokenizer, cfg.sparselong.train_on)
            setattr(meta, f"{name}_dataset", labelled)
        first = meta.train_dataset.select(range(min(_PREVIEW_ROWS, len(meta.train_dataset))))
        text = supervision.preview(first, tokenizer)
        if ranks.is_first():
            write_atomically(Path(cfg.sparselong.work) / SUPERVISION, text)
        labels = meta.train_dataset.select_columns("labels")
        self.supervised_token_fraction = supervision.supervised_fraction(labels)
        tell(f"{text}{self.supervised_token_fraction:.1%} of the tokens are supervised")
        return meta

    @staticmethod
    def _tell_dropped(name: str, dataset: Any, source: Path) -> None:
        with source.open(encoding="utf-8") as file:
            given = sum(1 for _ in file)
        if given > len(dataset):
            tell(f"{name}: {given - len(dataset)} of {given} conversations left out (too long)")

    def load_adapter(self, model, cfg, inference=False, config_only=False):
        tell(describe_weights(model))
        chunk_loss(model)
        section = cfg.sparselong
        tuned, config = add_masked_lora(
            model,
            targets=cfg.lora_target_modules,
            r=cfg.lora_r,
            alpha=cfg.lora_alpha,
            master_of=Masters(Path(cfg.sparselong.masters)).read,
            seed=cfg.seed,
            beside=ExtraAdapters(tuple(section.expert_targets), section.expert_r, section.router),
        )
        tell(parameter_table(tuned))
        return tuned, config

    def add_callbacks_post_trainer(self, cfg, trainer: Any):
        section, layers = cfg.sparselong, trainer.layers
        asked = {key: section[key] for key in section.kept_peak_bytes}
        self.keeping = decide_keeping(asked, section.kept_peak_bytes, section.nothing_to_keep)
        for key, decision in self.keeping.items():
            tell(f"{key} {decision}")
        return [
            MaskUpkeep(layers, trainer.progress, section.update_frequency, section.criterion),
            SecondPasses(**{key: decision.kept for key, decision in self.keeping.items()}),
            RouterWatch(trainer.model),
            Metrics(
                Path(section.work) / METRICS if ranks.is_first() else None,
                trainer.progress,
                section.loss_target,
            ),
        ]

    def post_trainer_create(self, cfg, trainer: Any):
        self.trainer = trainer
        trainer.bake_only = cfg.sparselong.bake_only
        trainer.heads_k_stride = cfg.sparselong.heads_k_stride
        trainer.take_place(
            ranks.mesh(),
            attention_backend=cfg.sparselong.attention_backend,
            deterministic=cfg.sparselong.deterministic,
        )
        if not ranks.is_first():
            return
        with trainer.settings():  # what the passes find, not what was asked for
            settings = current()
        receipt = {
            "plugin": f"{__name__}.{type(self).__name__}",
            "modules_replaced": sorted(tuned_layers(trainer.model)),
            "callbacks": [type(c).__name__ for c in trainer.callback_handler.callbacks],
            "trainer": type(trainer).__name__,
            "attention": trainer.model.get_base_model().config._attn_implementation,
            "fused_layers": sum(isinstance(m, FusedDecoderLayer) for m in trainer.model.modules()),
            "attention_backend": settings.attention_backend,
            "deterministic": settings.deterministic,
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
        write_atomically(Path(cfg.sparselong.work) / RECEIPT, json.dumps(receipt, indent=1) + "\n")

    def post_train(self, cfg, model):
        if self.done or self.trainer is None:  # Axolotl calls this hook twice
            return
        self.done = True
        trainer, work = self.trainer, Path(cfg.sparselong.work)
        best = trainer.state.best_model_checkpoint
        if best is None:
            raise StageError(
                "no checkpoint was found to be the best",
                "an evaluation with a finite loss before the end of training",
                "none",
                "check the validation conversations and training.eval_steps",
            )
        layers, rounding = tuned_layers(trainer.model), {}
        outcome = {
            "best_checkpoint": Path(best).name,
            "best_step": state.step_of(Path(best)),
            "best_eval_loss": trainer.state.best_metric,
            "steps": trainer.state.global_step,
            "mask_updates": trainer.progress.mask_updates,
            "peak_bytes": ranks.merge_peaks(trainer.progress.note_peaks()),
        }
        if ranks.is_first():
            write_atomically(work / TRAINED, "{}\n")
            tell(f"baking {Path(best).name} (validation loss {trainer.state.best_metric:.4f})")
            baked, rounding = bake_checkpoint(Path(cfg.base_model), layers, work / "model")
            trainer.model.save_pretrained(str(work / "adapter"))
            state.write(work / "adapter", trainer.layers, trainer.progress)
            name_adapter(work / "adapter", cfg.sparselong.name)
            outcome["two_four_conforming"] = two_four_conforming(baked)
        (rounding, *_) = ranks.collect(rounding)  # here the others wait for the files
        if rounding:  # the best loss is that of the sum before it was rounded
            put_baked_experts(Checkpoint(work / "model"), layers)
            with torch.no_grad():
                loader = trainer.get_eval_dataloader()
                evaluated = trainer.evaluation_loop(loader, "baked experts")
            outcome["expert_rounding"] = rounding
            loss = outcome["baked_eval_loss"] = evaluated.metrics["eval_loss"]
            tell(f"experts rounded to MXFP4 again: validation loss {loss:.4f} in place of the best")
        if ranks.is_first():
            write_atomically(work / BAKED, json.dumps(outcome, indent=1) + "\n")
        ranks.leave()
