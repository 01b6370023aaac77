"""Axolotl's YAML, made from our config; nobody writes it by hand.

What Axolotl decides by itself when a key is missing is set here explicitly, because its defaults
depend on the machine: precision (`bf16: auto` or none gives float16 on a CPU), its own LoRA kernels
(they would bypass the masked layer), evaluation packing, number of processes. Keys that would turn
on what does not hold for gpt-oss stay out: `context_parallel_size` above 1 lets every rank attend
to its own part only, so `sequence_parallel_degree` is not told to it.

Our plugin needs the run directory only (RUN_KEY): it reads the run's own config.yaml.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sparselong.config import Config
from sparselong.data import conversations
from sparselong.errors import StageError
from sparselong.finetune.training_run import RUN_KEY, TrainingRun
from sparselong.model import NAME, implementation
from sparselong.runtime import compute_dtype, default_device

PLUGIN = "sparselong.finetune.axolotl_plugin.SparseLongPlugin"
ADAPTER = "sparselong_masked_lora"
_FEW_ROWS = 5000


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


def build(
    run: TrainingRun, data: conversations.DataFiles, resume_from: Path | None, rows: int
) -> dict[str, Any]:
    """Return the document that `axolotl train` gets.

    Args:
        run: the run; `refuse_unsupported` must have passed for its config.
        data: the conversations.
        resume_from: checkpoint to continue from.
        rows: training conversations; few are tokenized in one process.
    """
    config = run.config
    training, device = config.training, default_device()
    on_gpu = device.type == "cuda"
    document: dict[str, Any] = {
        "base_model": str(run.compressed),
        "plugins": [PLUGIN],
        "adapter": ADAPTER,
        "lora_r": config.lora.r,
        "lora_alpha": config.lora.alpha,
        "lora_dropout": 0.0,
        "lora_target_modules": list(config.lora.target_modules),
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        "lora_mlp_kernel": False,
        **_data(run, data, rows),
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
        "output_dir": str(run.checkpoints),
        "use_tensorboard": training.use_tensorboard,
        **_wandb(config),
        RUN_KEY: str(run.directory),
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


def _data(run: TrainingRun, data: conversations.DataFiles, rows: int) -> dict[str, Any]:
    def source(path: Path) -> dict[str, Any]:
        return {
            "path": str(path.resolve()),
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
        "datasets": [source(data.train)],
        "test_datasets": [source(data.validation)],
        "val_set_size": 0,
        "dataset_prepared_path": str(run.work / "prepared"),
        "dataset_num_proc": 1 if rows < _FEW_ROWS else os.cpu_count(),
        "sequence_len": run.config.sequence_len,
        "sample_packing": run.config.training.sample_packing,
        "eval_sample_packing": False,
        # Axolotl's own choice beside packing would leave the last conversations out of evaluations.
        "dataloader_drop_last": False,
        "pad_to_sequence_len": run.config.training.sample_packing,
    }


def _wandb(config: Config) -> dict[str, Any]:
    if config.training.wandb_project is None:
        return {"use_wandb": False}
    return {"use_wandb": True, "wandb_project": config.training.wandb_project}
