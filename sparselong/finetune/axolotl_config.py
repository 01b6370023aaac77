"""Generate Axolotl's YAML from our config.

Some of Axolotl's defaults depend on the machine, so their keys are set explicitly: precision
(`bf16: auto` or a missing key gives float16 on a CPU), its own LoRA kernels (they would bypass the
masked layer), evaluation packing. Keys of features that are wrong for gpt-oss
are left out: with `context_parallel_size` above 1 every rank attends only to its own shard, so
`sequence_parallel_degree` is not passed to Axolotl.

Our plugin only needs the run directory (RUN_KEY), because it reads the run's config.yaml.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparselong.config import Config, TrainingSection
from sparselong.errors import StageError
from sparselong.finetune.training_run import RUN_KEY, TrainingRun
from sparselong.model import NAME, implementation
from sparselong.processes import check_cores, usable_cores
from sparselong.runtime import compute_dtype, default_device

PLUGIN = "sparselong.finetune.axolotl_plugin.SparseLongPlugin"
ADAPTER = "sparselong_masked_lora"


def attention_of(config: Config) -> str:
    """Return stage 03's attention implementation; only ours supports sharded sequences."""
    return NAME if config.sequence_parallel_degree > 1 else implementation(config)


def refuse_unsupported(config: Config, gpus: int, processes: int = 1) -> None:
    """Raise if this machine cannot train with the config.

    Args:
        config: the run's config.
        gpus: number of GPUs that torch can use.
        processes: number of processes that will train on this machine.

    Raises:
        StageError: a key needs a GPU and there is none, or there are fewer GPUs, or without any
            fewer cores, than processes.
    """
    check_cores(processes, gpus, usable_cores())
    if 0 < gpus < processes:
        raise StageError(
            f"this machine has too few GPUs for {processes} processes, one GPU each",
            f"{processes} visible GPUs (sequence_parallel_degree: "
            f"{config.sequence_parallel_degree})",
            f"{gpus}",
            f"pass sequence_parallel_degree={gpus}, or run on a machine with more GPUs",
        )
    needing_gpu = {
        "flash_attention=false": config.flash_attention,
        "training.optimizer=adamw_torch": config.training.is_8bit,
    }
    for fix, wanted in needing_gpu.items():
        if wanted and not gpus:
            raise StageError(
                "this config needs a GPU for fine-tuning",
                "a CUDA GPU that torch can use",
                "no CUDA GPU",
                f"run on a machine with a GPU, or pass {fix}",
            )


def build(run: TrainingRun, resume_from: Path | None) -> dict[str, Any]:
    """Return the YAML document for `axolotl train`.

    Args:
        run: the run; `refuse_unsupported` must have accepted its config.
        resume_from: checkpoint to resume from.
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
        **_data(run),
        "bf16": on_gpu,
        "fp16": False,
        "tf32": False,
        "torch_dtype": str(compute_dtype(device)).removeprefix("torch."),
        # The plugin replaces flex with our attention, which has the same requirements (dtypes,
        # packing).
        "attn_implementation": "flex_attention" if config.flash_attention else "eager",
        "micro_batch_size": config.micro_batch_size,
        "eval_batch_size": config.micro_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        **_schedule(config),
        "resume_from_checkpoint": str(resume_from) if resume_from else None,
        "output_dir": str(run.axolotl),
        # A callback of ours tells the trackers, which then get the same figures as metrics.jsonl.
        **{"use_tensorboard": False, "use_wandb": False},
        RUN_KEY: str(run.directory),
    }
    if training.gradient_checkpointing:
        document["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    return {key: value for key, value in document.items() if value is not None}


def _schedule(config: Config) -> dict[str, Any]:
    training = config.training
    return {
        "num_epochs": training.num_epochs,
        "max_steps": training.max_steps,
        "learning_rate": training.learning_rate,
        "lr_scheduler": training.lr_scheduler,
        **_shape(training),
        "warmup_ratio": training.warmup_ratio,
        "weight_decay": training.weight_decay,
        "optimizer": training.optimizer,
        # Lion's own; transformers would pass AdamW's 0.999.
        "adam_beta2": 0.99 if training.optimizer == "lion_8bit" else None,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": training.gradient_checkpointing,
        "seed": config.seed,
        "logging_steps": training.logging_steps,
        "eval_steps": training.eval_steps,
        "save_steps": training.save_steps,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
    }


def _shape(training: TrainingSection) -> dict[str, Any]:
    """Return what shapes the learning rate schedule, under the names of each schedule's own."""
    name, peak = training.lr_scheduler, training.learning_rate
    least = training.min_lr_ratio or 0.0
    if name == "rex":
        return {"cosine_min_lr_ratio": least}
    own: dict[str, Any] = {}
    if name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):
        own = {"min_lr_rate": least}
    elif name == "cosine_with_restarts":
        own = {"num_cycles": training.lr_cycles}
    elif name == "polynomial":
        own = {"lr_end": least * peak}
    elif name == "warmup_stable_decay":
        # A fraction of all steps; the trainer turns it into a number of steps.
        own = {"num_decay_steps": training.lr_decay_ratio, "min_lr_ratio": least}
    elif name in ("reduce_lr_on_plateau", "greedy"):
        own = {"min_lr": least * peak, "patience": training.lr_patience or 10}
        own |= {"max_lr": peak} if name == "greedy" else {}
    return {"lr_scheduler_kwargs": own} if own else {}


def _data(run: TrainingRun) -> dict[str, Any]:
    # The plugin gives Axolotl the tokens; its schema wants a name for them, which it never opens.
    path = str(run.directory / "data" / "encoded")
    return {
        "datasets": [{"path": path, "type": "sparselong"}],
        "test_datasets": [{"path": path, "type": "sparselong"}],
        "val_set_size": 0,
        "sequence_len": run.config.sequence_len,
        "sample_packing": run.config.training.sample_packing,
        "eval_sample_packing": False,
        # Axolotl's default with packing would drop the last conversations from evaluations.
        "dataloader_drop_last": False,
        "pad_to_sequence_len": run.config.training.sample_packing,
    }
