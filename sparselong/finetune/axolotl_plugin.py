"""Our side of Axolotl, through its plugin hooks only; the one file that imports axolotl.

| hook                         | what we do there                                                  |
|------------------------------|-------------------------------------------------------------------|
| `register`                   | expected failures are told to the stage's process (failure.json)  |
| `load_datasets`              | Axolotl's own loader; count supervised tokens, show a preview     |
| `get_adapter_capabilities`,  | our adapter: masked LoRA layers built through PEFT's registry of  |
| `load_adapter`               | custom modules over stage 02's packed layers and masters          |
| `get_trainer_cls`            | Axolotl's trainer, with masks and scales in its checkpoints       |
| `get_training_args`          | a NaN loss must show; early stopping must survive a restart       |
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
import math
import os
import sys
import traceback
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from axolotl.cli.args import TrainerCliArgs
from axolotl.common.datasets import TrainDatasetMeta, load_datasets
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from axolotl.loaders import load_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import BaseModel
from safetensors import safe_open
from torch import nn
from transformers import set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

import sparselong
from sparselong.errors import ExpectedError, StageError
from sparselong.finetune import state, supervision
from sparselong.finetune.axolotl_config import ADAPTER
from sparselong.finetune.bake import bake, two_four_conforming, write_adapter_readme
from sparselong.finetune.callbacks import MaskUpkeep, Metrics, peak_bytes, tell
from sparselong.finetune.documents import document_masks
from sparselong.finetune.lora import MaskedLoraLinear, masked_layers
from sparselong.model.packed_linear import PackedLinear
from sparselong.run import write_atomically

RECEIPT, FAILURE, BAKED, TRAINED = "receipt.json", "failure.json", "baked.json", "trained.json"
_PREVIEW_ROWS = 3
_PACKAGES = ("axolotl", "transformers", "peft", "torch", "accelerate", "datasets")


class SparseLongSection(BaseModel):
    """The `sparselong:` section of the generated YAML."""

    masters: str
    work: str
    update_frequency: float
    criterion: str
    train_on: str
    loss_target: float | None = None
    bake_only: bool = False


class SparseLongArgs(BaseModel):
    """What the plugin adds to Axolotl's schema."""

    sparselong: SparseLongSection


class MaskedTrainer(AxolotlTrainer):
    """Axolotl's trainer whose checkpoints hold masks and scales, and whose losses are per token.

    Axolotl averages the micro-batches' mean losses; here, in training and evaluation alike, a
    token weighs the same wherever it stands.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # the loss divides by num_items_in_batch itself
        self.progress = state.Progress()
        self.bake_only = False
        self._evaluated = [0.0, 0.0]

    @property
    def layers(self) -> dict[str, MaskedLoraLinear]:
        """The masked layers by name."""
        return masked_layers(self.model)

    def training_step(self, model, inputs, num_items_in_batch=None):
        masked, placed = "attention_mask" in inputs, "position_ids" in inputs
        if self.args.sample_packing and (masked or not placed):
            raise StageError(
                "packed conversations would attend to each other",
                "position ids that start anew with each conversation, and no attention mask",
                f"a batch of {', '.join(sorted(inputs))}",
                "pass training.sample_packing=false",
            )
        if masked:
            tokens = inputs["attention_mask"].sum()
        else:
            tokens = (inputs["input_ids"] != self.processing_class.pad_token_id).sum()
        self.progress.tokens += int(tokens)
        return super().training_step(model, inputs, num_items_in_batch)

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        if "position_ids" in inputs and "attention_mask" not in inputs:
            config, dtype = self.model.config, self.model.get_input_embeddings().weight.dtype
            inputs["attention_mask"] = document_masks(config, inputs["position_ids"], dtype)
        return inputs

    def prediction_step(self, model, inputs, *args, **kwargs):
        outcome = super().prediction_step(model, inputs, *args, **kwargs)
        predicted = int((inputs["labels"][:, 1:] != supervision.IGNORED).sum())
        if predicted:
            self._evaluated[0] += float(outcome[0]) * predicted
            self._evaluated[1] += predicted
        return outcome

    def evaluation_loop(self, *args, **kwargs):
        self._evaluated = [0.0, 0.0]
        output = super().evaluation_loop(*args, **kwargs)
        total, predicted = self._evaluated
        output.metrics["eval_loss"] = total / predicted if predicted else math.nan
        return output

    def _run_epoch(self, *args, **kwargs):
        # Resumed behind its last step, the loop would take one step more.
        if self.bake_only or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        directory = Path(output_dir or self.args.output_dir)
        if directory.name.startswith(PREFIX_CHECKPOINT_DIR):
            state.write(directory, self.layers, self.progress)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._restore(Path(resume_from_checkpoint))

    def _load_best_model(self):
        super()._load_best_model()
        counters = vars(self.progress).copy()
        self._restore(Path(self.state.best_model_checkpoint))
        vars(self.progress).update(counters)  # the run's history does not go back with the weights

    def _restore(self, directory: Path) -> None:
        vars(self.progress).update(vars(state.read(directory, self.layers)))


class SparseLongPlugin(BasePlugin):
    """See the table in the module's text."""

    def __init__(self):
        super().__init__()
        self.trainer: MaskedTrainer | None = None
        self.supervised_token_fraction = 0.0
        self.done = False

    def register(self, cfg):
        work = Path(cfg["sparselong"]["work"])
        sys.excepthook = lambda kind, error, trace: _tell_failure(work, kind, error, trace)

    def get_input_args(self):
        return f"{__name__}.SparseLongArgs"

    def get_adapter_capabilities(self):
        return [AdapterCapabilities(name=ADAPTER, lora_like=True)]

    def get_trainer_cls(self, cfg):
        return MaskedTrainer

    def get_training_args(self, cfg):
        return {
            "logging_nan_inf_filter": False,
            "restore_callback_states_from_checkpoint": True,
            "eval_on_start": not cfg.resume_from_checkpoint,  # the curve begins at stage 02's model
            "disable_tqdm": True,
            "dataloader_pin_memory": torch.cuda.is_available(),
        }

    def load_datasets(self, cfg, preprocess=False):
        try:
            meta = load_datasets(cfg=cfg, cli_args=TrainerCliArgs())
        except ValueError as error:
            raise StageError(
                "the conversations cannot be trained on",
                "rows that fit into sequence_len and have supervised tokens",
                str(error),
                "raise sequence_len, or check the rows' roles and data.train_on",
            ) from error
        for name, path in (("train", cfg.datasets), ("eval", cfg.test_datasets)):
            self._tell_dropped(name, getattr(meta, f"{name}_dataset"), Path(path[0]["path"]))
        if cfg.sparselong.train_on == "all":
            meta = _supervise_everything(meta)
        self.supervised_token_fraction = supervision.supervised_fraction(
            meta.train_dataset.select_columns("labels")
        )
        first = meta.train_dataset.select(range(min(_PREVIEW_ROWS, len(meta.train_dataset))))
        text = supervision.preview(first, load_tokenizer(cfg))
        write_atomically(Path(cfg.sparselong.work) / "supervision.txt", text)
        tell(f"{text}{self.supervised_token_fraction:.1%} of the tokens are supervised")
        return meta

    @staticmethod
    def _tell_dropped(name: str, dataset: Any, source: Path) -> None:
        with source.open(encoding="utf-8") as file:
            given = sum(1 for _ in file)
        if given > len(dataset):
            tell(f"{name}: {given - len(dataset)} of {given} conversations left out (too long)")

    def load_adapter(self, model, cfg, inference=False, config_only=False):
        names = list(cfg.lora_target_modules)
        modules = dict(model.named_modules())
        unmatched = [n for n in names if not any(_ends_in(module, n) for module in modules)]
        targets = {m: modules[m] for m in modules if any(_ends_in(m, name) for name in names)}
        foreign = [m for m, t in targets.items() if not isinstance(t, (PackedLinear, nn.Linear))]
        if unmatched or foreign:
            linear = {
                m.rpartition(".")[2] for m, t in modules.items() if isinstance(t, PackedLinear)
            }
            raise StageError(
                f"lora.target_modules: {', '.join(unmatched or foreign)} cannot get an adapter",
                f"names of shared dense layers: {', '.join(sorted(linear))}",
                "no such layer" if unmatched else "not a linear layer",
                "correct lora.target_modules",
            )
        config = LoraConfig(
            r=cfg.lora_r,
            lora_alpha=cfg.lora_alpha,
            target_modules=names,
            task_type="CAUSAL_LM",
            base_model_name_or_path=cfg.base_model,
        )
        masters = _Masters(Path(cfg.sparselong.masters))

        def build(target: nn.Module, adapter_name: str, **kwargs: Any) -> MaskedLoraLinear:
            return MaskedLoraLinear(target, adapter_name, master_of=masters.read, **kwargs)

        config._register_custom_module({PackedLinear: build, nn.Linear: build})
        set_seed(cfg.seed)  # Axolotl seeds when the trainer is made, after A has been drawn
        tuned = get_peft_model(model, config)
        tell(_parameter_table(tuned))
        return tuned, config

    def add_callbacks_post_trainer(self, cfg, trainer):
        section, layers = cfg.sparselong, trainer.layers
        return [
            MaskUpkeep(layers, trainer.progress, section.update_frequency, section.criterion),
            Metrics(Path(section.work) / "metrics.jsonl", trainer.progress, section.loss_target),
        ]

    def post_trainer_create(self, cfg, trainer):
        self.trainer = trainer
        trainer.bake_only = cfg.sparselong.bake_only
        receipt = {
            "plugin": f"{__name__}.{type(self).__name__}",
            "modules_replaced": sorted(trainer.layers),
            "callbacks": [type(c).__name__ for c in trainer.callback_handler.callbacks],
            "trainer": type(trainer).__name__,
            "trainable_parameters": _trainable(trainer.model),
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
        write_atomically(work / TRAINED, "{}\n")
        tell(f"baking {Path(best).name} (validation loss {trainer.state.best_metric:.4f})")
        baked = bake(Path(cfg.base_model), trainer.layers, work / "model")
        trainer.model.save_pretrained(work / "adapter")
        state.write(work / "adapter", trainer.layers, trainer.progress)
        write_adapter_readme(work / "adapter", baked.config.get("_name_or_path", "gpt-oss"))
        layer = next(iter(trainer.layers.values()))
        outcome = {
            "best_checkpoint": Path(best).name,
            "best_step": state.step_of(Path(best)),
            "best_eval_loss": trainer.state.best_metric,
            "steps": trainer.state.global_step,
            "two_four_conforming": two_four_conforming(baked, layer.fmt),
            "mask_updates": trainer.progress.mask_updates,
            "peak_bytes": peak_bytes(),
        }
        write_atomically(work / BAKED, json.dumps(outcome, indent=1) + "\n")


class _Masters:
    """Stage 02's dense masters, read one at a time."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.files: dict[str, Path] = {}
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self.files |= dict.fromkeys(file.keys(), path)

    def read(self, module: str) -> torch.Tensor:
        """The master of a module, bf16 [out, in]."""
        name = f"{module}.weight"
        if name not in self.files:
            raise StageError(
                f"stage 02 left no master of {module}",
                f"{name} in {self.directory}",
                f"{len(self.files)} masters of other layers",
                "redo it: python 02_compress.py --force",
            )
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)


def _ends_in(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _supervise_everything(meta: TrainDatasetMeta) -> TrainDatasetMeta:
    """Labels every token: Axolotl's chat strategy knows the turns, not what stands between."""
    for name in ("train_dataset", "eval_dataset"):
        dataset = getattr(meta, name)
        setattr(meta, name, dataset.map(lambda row: {"labels": row["input_ids"]}))
    return meta


def _trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _parameter_table(model: PeftModel) -> str:
    """Trainable parameters by kind of layer, as text."""
    counts: Counter[str] = Counter()
    layers: Counter[str] = Counter()
    shapes: dict[str, str] = {}
    for name, layer in masked_layers(model).items():
        kind = name.rpartition(".")[2]
        lora_a, lora_b, _ = layer.adapter()
        counts[kind] += lora_a.numel() + lora_b.numel()
        layers[kind] += 1
        shapes[kind] = f"{layer.out_features} x {layer.in_features}"
    rows = [f"{'layer':10} {'count':>6} {'weight':>14} {'trainable':>14}"]
    rows += [f"{k:10} {layers[k]:>6} {shapes[k]:>14} {counts[k]:>14,}" for k in counts]
    rows.append(f"{'sum':10} {sum(layers.values()):>6} {'':>14} {_trainable(model):>14,}")
    return "\n".join(rows)


def _tell_failure(
    work: Path, kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Python's last resort for an exception: what is expected goes to the stage's process."""
    traceback.print_exception(kind, error, trace)
    told = _explain(error, work)
    if told is not None:
        keys = ("what", "expected", "found", "fix")
        document = json.dumps({key: getattr(told, key) for key in keys})
        (work / FAILURE).write_text(document, encoding="utf-8")


def _explain(error: BaseException, work: Path) -> ExpectedError | None:
    if isinstance(error, ExpectedError):
        return error
    if "No space left on device" in str(error) or "file write failed" in str(error):
        return StageError(
            f"03_finetune could not write to {work}",
            "room on the disk",
            str(error).splitlines()[0],
            "free some space, then run the same command again: whole checkpoints are kept",
        )
    if isinstance(error, torch.OutOfMemoryError):
        return StageError(
            "the GPU's memory does not suffice",
            "the micro-batch to fit beside the model",
            str(error).splitlines()[0],
            "lower sequence_len or micro_batch_size, or set training.gradient_checkpointing=true",
        )
    return None
