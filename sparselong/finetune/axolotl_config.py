"""Axolotl's YAML, made from our config; nobody writes it by hand.

What Axolotl decides by itself when a key is missing is set here explicitly, because its defaults
depend on the machine: precision (`bf16: auto` or none gives float16 on a CPU), its own LoRA kernels
(they would bypass the masked layer), evaluation packing, number of processes. Keys that would turn
on what does not hold for gpt-oss stay out: `context_parallel_size` above 1 lets every rank attend
to its own part only, so `sequence_parallel_degree` goes to our plugin alone.

`sparselong:` is the plugin's own section: what masked LoRA needs and where results go.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparselong.config import Config
from sparselong.errors import StageError
from sparselong.memory import find_shape, kept_peaks
from sparselong.model import NAME, implementation
from sparselong.runtime import compute_dtype, default_device

PLUGIN = "sparselong.finetune.axolotl_plugin.SparseLongPlugin"
ADAPTER = "sparselong_masked_lora"
METRICS, SUPERVISION = "metrics.jsonl", "supervision.txt"
CHECKPOINTS = "checkpoints"
RECEIPT, BAKED, TRAINED = "receipt.json", "baked.json", "trained.json"
_FEW_ROWS = 5000


@dataclass(frozen=True)
class Folders:
    """Where stage 03 reads and writes; every path absolute, as Axolotl may change directory."""

    compressed: Path
    """Stage 02's folder, with `model/` and `masters/`."""
    work: Path
    """`runs/NAME/03_finetune`."""
    train: Path
    validation: Path
    name: str
    """Stage 02's name of its checkpoint."""

    @property
    def checkpoints(self) -> Path:
        """Axolotl's output directory, with `checkpoint-N/` in it."""
        return self.work / CHECKPOINTS


def attention_of(config: Config) -> str:
    """The attention that stage 03 trains with; a split sequence has ours only, on any device."""
    return NAME if config.sequence_parallel_degree > 1 else implementation(config)


def refuse_unsupported(config: Config, gpus: int, processes: int = 1) -> None:
    """Stops what this machine cannot train.

    Args:
        gpus: that can be used here.
        processes: that will train on this machine.

    Raises:
        StageError: a key needs a GPU and there is none, or there are fewer GPUs than processes.
    """
    if 0 < gpus < processes:
        raise StageError(
            f"{processes} processes are to train on this machine, each on a GPU of its own",
            f"{processes} visible GPUs (sequence_parallel_degree: "
            f"{config.sequence_parallel_degree})",
            f"{gpus}",
            f"pass sequence_parallel_degree={gpus}, or run on a machine with more GPUs",
        )
    needing_gpu = {
        "flash_attention=false": config.flash_attention,
        "training.optimizer=adamw_torch": config.training.optimizer == "adamw_bnb_8bit",
    }
    for fix, wanted in needing_gpu.items():
        if wanted and not gpus:
            raise StageError(
                "this config needs a GPU to fine-tune, and there is none",
                "a CUDA GPU that torch can use",
                "no CUDA GPU",
                f"run on a machine with a GPU, or pass {fix}",
            )


def check_heads(config: Config, model: Path) -> None:
    """Stops a `heads_k_stride` that does not divide the model's key/value heads.

    Args:
        model: stage 02's `model/`.
    """
    heads = json.loads((model / "config.json").read_text(encoding="utf-8"))["num_key_value_heads"]
    if config.sequence_parallel_degree > 1 and heads % config.heads_k_stride:
        raise StageError(
            "the key/value heads cannot be gathered by groups of heads_k_stride",
            f"a divisor of the model's {heads} key/value heads",
            f"heads_k_stride: {config.heads_k_stride}",
            "pass heads_k_stride=1, or another divisor",
        )


def build(
    config: Config, folders: Folders, resume_from: Path | None, rows: int, bake_only: bool = False
) -> dict[str, Any]:
    """The document that `python -m axolotl.cli.main train` gets.

    Args:
        config: the run's config; `refuse_unsupported` must have passed.
        folders: where things are.
        resume_from: checkpoint to go on from.
        rows: training conversations; few are tokenized in one process.
        bake_only: training is over; only write the result.
    """
    training, device = config.training, default_device()
    on_gpu = device.type == "cuda"
    document: dict[str, Any] = {
        "base_model": str(folders.compressed / "model"),
        "plugins": [PLUGIN],
        "adapter": ADAPTER,
        "lora_r": config.lora.r,
        "lora_alpha": config.lora.alpha,
        "lora_dropout": 0.0,
        "lora_target_modules": list(config.lora.target_modules),
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        "lora_mlp_kernel": False,
        **_data(config, folders, rows),
        "bf16": on_gpu,
        "fp16": False,
        "tf32": False,
        "torch_dtype": str(compute_dtype(device)).removeprefix("torch."),
        # The plugin puts its own in place of flex, whose needs (types, packing) are ours too.
        "attn_implementation": "flex_attention" if config.flash_attention else "eager",
        "micro_batch_size": config.micro_batch_size,
        "eval_batch_size": config.micro_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        **_schedule(config),
        "resume_from_checkpoint": str(resume_from) if resume_from else None,
        "output_dir": str(folders.checkpoints),
        "use_tensorboard": training.use_tensorboard,
        **_wandb(config),
        "sparselong": _plugin_section(config, folders, bake_only),
    }
    if training.gradient_checkpointing:
        document["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
        document["activation_offloading"] = (
            "hidden_states" if training.offload_checkpoints else None
        )
    return {key: value for key, value in document.items() if value is not None}


def _schedule(config: Config) -> dict[str, Any]:
    training = config.training
    return {
        "num_epochs": training.num_epochs,
        "max_steps": training.max_steps,
        "learning_rate": training.learning_rate,
        "lr_scheduler": training.lr_scheduler,
        "warmup_ratio": training.warmup_ratio,
        "weight_decay": training.weight_decay,
        "optimizer": training.optimizer,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": training.gradient_checkpointing,
        "seed": config.seed,
        "logging_steps": training.logging_steps,
        "eval_steps": training.eval_steps,
        "save_steps": training.save_steps,
        "save_total_limit": training.save_total_limit,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "early_stopping_patience": training.early_stopping_patience,
    }


def _data(config: Config, folders: Folders, rows: int) -> dict[str, Any]:
    def source(path: Path) -> dict[str, Any]:
        return {
            "path": str(path),
            "ds_type": "json",
            "split": "train",
            "type": "chat_template",
            "field_messages": "messages",
            "message_property_mappings": {"role": "role", "content": "content"},
            "field_thinking": "thinking",
            "template_thinking_key": "thinking",
            "roles_to_train": ["assistant"],
            "train_on_eos": "turn",
        }

    return {
        "chat_template": "tokenizer_default",
        "eot_tokens": ["<|end|>", "<|return|>"],
        "datasets": [source(folders.train)],
        "test_datasets": [source(folders.validation)],
        "val_set_size": 0,
        "dataset_prepared_path": str(folders.work / "prepared"),
        "dataset_num_proc": 1 if rows < _FEW_ROWS else os.cpu_count(),
        "sequence_len": config.sequence_len,
        "sample_packing": config.training.sample_packing,
        "eval_sample_packing": False,
        # Axolotl's own choice beside packing would leave the last conversations out of evaluations.
        "dataloader_drop_last": False,
        "pad_to_sequence_len": config.training.sample_packing,
    }


def _wandb(config: Config) -> dict[str, Any]:
    if config.training.wandb_project is None:
        return {"use_wandb": False}
    return {"use_wandb": True, "wandb_project": config.training.wandb_project}


def _plugin_section(config: Config, folders: Folders, bake_only: bool) -> dict[str, Any]:
    upkeep = config.finetuning_modifiers.MagnitudePruningModifier
    device = "cuda" if default_device().type == "cuda" else "cpu"
    return {
        "masters": str(folders.compressed / "masters"),
        "work": str(folders.work),
        "name": folders.name,
        "attention": attention_of(config),
        "attention_backend": config.attention_backend,
        "deterministic": config.deterministic,
        "heads_k_stride": config.heads_k_stride,
        "expert_targets": list(config.lora.expert_targets),
        "expert_r": config.lora.expert_r,
        "router": config.lora.router,
        "update_frequency": upkeep.update_frequency,
        "criterion": upkeep.criterion,
        "keep_attention": config.training.keep_attention,
        "keep_experts": config.training.keep_experts,
        "kept_peak_bytes": kept_peaks(find_shape(config.model), config, device),
        "nothing_to_keep": config.nothing_to_keep(device),
        "train_on": config.data.train_on,
        "loss_target": config.training.loss_target,
        "bake_only": bake_only,
    }
