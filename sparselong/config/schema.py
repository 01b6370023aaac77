"""The one schema: every key a person can set, with its meaning, unit and choices.

A config is a YAML file with the original design's key names. It is read strictly: an unknown key, a
repeated key or a value of the wrong type is refused with the line it stands on, the nearest known
key and what to write instead. The docstring under each field is the documentation: the comments in
the shipped YAML files and `configs/schema.json` (for editors) are generated from it by
`python -m sparselong.config.docs`, and a test fails when they drift. A key marked `Incidental`
decides no result and may change when a run continues.

Values come, weakest first, from the schema's defaults, the profile, the file and the command line's
`key.path=value`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from sparselong.config import yaml12
from sparselong.config.keys import (
    Incidental,
    Section,
    deciding_values,
    fill_sections,
    refuse,
    set_key,
)
from sparselong.config.profiles import PROFILES
from sparselong.errors import ConfigError

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1)]
Names = Annotated[tuple[str, ...], Field(min_length=1)]


class ModelSection(Section):
    """Which model is worked on."""

    base: str = "openai/gpt-oss-120b"
    """Base checkpoint: a hub name, a local directory in openai/gpt-oss's own format (MXFP4 experts,
    bf16 rest), or `tiny` for a small gpt-oss made and trained on the spot."""
    revision: str = "main"
    """Branch, tag or commit of the base checkpoint on the hub."""
    tiny_layers: Positive = 4
    """Number of layers of the `tiny` model."""
    tiny_steps: Annotated[int, Field(ge=0)] = 600
    """Optimizer steps that the `tiny` model is trained for before it serves as a base."""


class SharedDenseSection(Section):
    """How the dense layers that every token passes (q, k, v, o projections) are stored."""

    weight_bits: Literal[4, 8, 16] = 4
    """Bits per kept weight: 4 or 8 (integers, symmetric, one bf16 scale per group), 16 (bf16)."""
    sparsity: Literal["2:4", "none"] = "2:4"
    """`2:4` keeps two of every four neighbouring input weights; `none` keeps all."""
    group_size: Literal[32, 64] = 64
    """Input weights that share one scale. (2880 and 4096 are both divisible by 32 and 64 only.)"""


class ExpertsSection(Section):
    """How the experts (98 % of the weights) are stored."""

    weight_bits: Literal[4] = 4
    """Bits per expert weight: MXFP4 as published, bit-exact."""
    sparsity: Literal["none", "2:4"] = "none"
    """`2:4` drops the two smallest of every four expert weights (3.0 bits per weight instead of
    4.25); the kept ones stay bit-exact. It costs quality without long tuning."""


class CalibrationSection(Section):
    """The text that stage 02 runs through the model to see which weights matter."""

    samples: Positive = 128
    """Number of calibration sequences, taken from the training data."""
    sequence_len: Annotated[int, Field(ge=2)] = 2048
    """Length of a calibration sequence, in tokens."""
    dampening: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.01
    """Share of the Hessian's mean diagonal that is added to its diagonal before inversion."""


class DataSection(Section):
    """Conversations to fine-tune on."""

    train: str = "HuggingFaceH4/Multilingual-Thinking"
    """A JSON-lines file of `{"messages": [{"role", "content"}, …]}` rows, a hub dataset with a
    `messages` column, or `demo` for conversations made from the Python library's documentation."""
    validation: str | None = None
    """A JSON-lines file like `train`'s; null sets `validation_fraction` of `train` aside."""
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Share of the conversations set aside for validation when `validation` is null."""
    train_on: Literal["assistant", "all"] = "assistant"
    """`assistant` learns from the assistant's turns only; `all` from every token."""


class LoraSection(Section):
    """Low-rank adapters on shared dense layers and, if asked for, on experts and router.

    Those of the dense layers and the router are trained through mask and rounding."""

    r: Positive = 16
    """Rank of the adapter."""
    alpha: Annotated[float, Field(gt=0.0)] = 32.0
    """The adapter's product is scaled by alpha / r."""
    target_modules: Names = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Names of the layers that get an adapter. A name that matches nothing stops the stage."""
    expert_targets: tuple[Literal["gate_up_proj", "down_proj"], ...] = ()
    """Expert weights of which every expert gets an adapter: `gate_up_proj`, `down_proj`, both or
    none. They are trained beside the MXFP4 weights, not through them: the final model has the sum
    rounded to MXFP4 again, and the stage reports what that loses."""
    expert_r: Annotated[int, Field(ge=1, le=64)] | None = None
    """Rank of each expert's adapter, set together with `expert_targets`; the product is scaled by
    alpha / expert_r."""
    router: bool = False
    """Whether each layer's router gets an adapter of rank r, too."""


class MaskUpdateSection(Section):
    """When and how the 2:4 masks are chosen anew during fine-tuning."""

    update_frequency: Annotated[float, Field(ge=0.0, le=1.0)] = 0.05
    """Masks are recomputed every this fraction of the training steps; 0 keeps them fixed. They are
    frozen for the last interval."""
    criterion: Literal["hysteresis", "magnitude"] = "hysteresis"
    """`hysteresis` lets a pruned weight return only if it has gained more than half a quantization
    step on a survivor since stage 02, so that neither an untrained adapter nor noise flips a bit;
    `magnitude` keeps the two largest of four, plainly."""


class ModifiersSection(Section):
    """Named as llmcompressor names its modifiers; carried out by this project's own callback."""

    MagnitudePruningModifier: MaskUpdateSection = MaskUpdateSection()
    """Upkeep of the 2:4 masks."""


class TrainingSection(Section):
    """The optimizer's run, in Axolotl's names."""

    num_epochs: Annotated[float, Field(gt=0.0)] = 1.0
    """Passes over the training data."""
    max_steps: Positive | None = None
    """Optimizer steps; null follows from `num_epochs`."""
    gradient_accumulation_steps: Positive = 8
    """Micro-batches per optimizer step."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 2e-4
    """Peak learning rate."""
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after warm-up."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps over which the learning rate rises from zero."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled weight decay of the adapters."""
    optimizer: Literal["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit"] = "adamw_torch_fused"
    """Optimizer, by transformers' name; the 8-bit one saves memory and needs a GPU."""
    sample_packing: bool = True
    """Fill every sequence with several conversations, kept apart by position ids."""
    gradient_checkpointing: Annotated[bool, Incidental()] = True
    """Recompute each layer in the backward pass instead of keeping its activations."""
    keep_attention: Annotated[Literal["auto", "always", "never"], Incidental()] = "auto"
    """Whether checkpointed layers with full attention keep what it computed, so that the backward
    pass does not attend twice: 8.25 KiB a token and such layer (20b at 16,384: 1.5 GiB). `auto`
    keeps it where the predicted peak fits what the GPU has free; the log and manifest say which."""
    keep_experts: Annotated[Literal["auto", "always", "never"], Incidental()] = "auto"
    """Whether checkpointed layers keep their experts' first product, so that the backward pass does
    not make it again: 45 KiB a token and layer (20b at 4,096 tokens a GPU: 4.2 GiB). `auto` decides
    as above, after attention, which saves more time for its bytes."""
    offload_checkpoints: Annotated[bool, Incidental()] = False
    """Keep checkpointed layers' inputs in pinned host memory, for contexts that do not fit else."""
    logging_steps: Annotated[Positive, Incidental()] = 1
    """Steps between rows of metrics.jsonl. `save_steps` must be a multiple of it."""
    eval_steps: Positive = 50
    """Steps between evaluations on the validation conversations."""
    save_steps: Annotated[Positive, Incidental()] = 50
    """Steps between checkpoints; a multiple of `eval_steps`, so that the best one is on disk."""
    save_total_limit: Annotated[Positive, Incidental()] = 3
    """Checkpoints kept; the best one is always among them."""
    early_stopping_patience: Positive | None = None
    """Evaluations without improvement after which training stops; null never stops early."""
    loss_target: Annotated[float | None, Incidental()] = None
    """Training loss at which an alert is logged once; null logs none."""
    use_tensorboard: Annotated[bool, Incidental()] = False
    """Also write TensorBoard event files."""
    wandb_project: Annotated[str | None, Incidental()] = None
    """Also log to this Weights & Biases project; null does not."""


class EvaluationSection(Section):
    """What stage 04 measures, on base, compressed and fine-tuned model alike."""

    tasks: Names = ("hellaswag",)
    """lm-eval task names; `demo_hellaswag` is a hellaswag made from the demo's held-out text."""
    limit: Positive | None = None
    """Items per task; null takes all."""
    num_fewshot: Annotated[int, Field(ge=0)] = 0
    """Solved examples shown before each item."""
    batch_size: Positive = 8
    """Requests per forward pass."""
    perplexity_samples: Positive = 256
    """Validation conversations whose perplexity is measured."""


class Config(Section):
    """One run: model, compression, data, training, evaluation."""

    profile: Literal["quick_test", "standard", "high_quality", "memory_efficient"] = "standard"
    """A set of defaults: `quick_test` shows that everything works, `high_quality` takes longer,
    `memory_efficient` fits smaller cards. A key that is set explicitly wins over the profile."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Seed of everything random."""
    model: ModelSection = ModelSection()
    shared_dense: SharedDenseSection = SharedDenseSection()
    experts: ExpertsSection = ExpertsSection()
    calibration: CalibrationSection = CalibrationSection()
    data: DataSection = DataSection()
    sequence_len: Annotated[int, Field(ge=2)] = 16384
    """Training context, in tokens, over all GPUs together."""
    sequence_parallel_degree: Annotated[Positive, Incidental()] = 4
    """Processes, each with a GPU, that share one sequence. `python 03_finetune.py` starts them on
    this machine; `torchrun` may start a multiple of them, on several machines too, which then train
    on several sequences side by side."""
    flash_attention: bool = True
    """Attention without a quadratic score matrix (needs a GPU); false uses transformers' eager,
    unless a sequence is split: then this project's attention serves on any device."""
    attention_backend: Literal["auto", "triton", "torch_flash", "torch_cudnn", "flash_attn"] = (
        "auto"
    )
    """Kernels that attend with `flash_attention`: `auto` takes for each kind of layer the fastest
    that was measured on this GPU (01_health says which); a named one serves every layer or stops
    the stage. `flash_attn` must be installed; `torch_cudnn` takes no sliding windows, which every
    second layer of gpt-oss has, so that only `auto` can use it."""
    deterministic: bool = False
    """Attention's gradients come out the same to the bit in every run. The Triton kernels always do
    so; torch_flash's backward pass is slower for it, and torch_cudnn's is not used."""
    micro_batch_size: Positive = 1
    """Sequences per forward pass."""
    heads_k_stride: Annotated[Positive, Incidental()] = 1
    """Key/value heads gathered at a time when a sequence is split over GPUs; a divisor of their
    number. More take fewer exchanges and more memory. On four H200, 16,384 tokens and a full
    layer, 8 was fastest with peer access (6.0 ms, 4: 6.6), 4 without (7.6 ms, 8: 8.0)."""
    ring_attn_func: Annotated[Literal["varlen_llama3"], Incidental()] = "varlen_llama3"
    """How split sequences attend: `varlen_llama3` gathers the keys and values of full layers by
    groups of heads; sliding-window layers take only the keys just before their shard."""
    lora: LoraSection = LoraSection()
    finetuning_modifiers: ModifiersSection = ModifiersSection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()

    @model_validator(mode="after")
    def _check_attention(self) -> Config:
        if self.attention_backend == "torch_cudnn":
            raise ValueError(
                "attention_backend: torch_cudnn takes no sliding windows and no packed documents, "
                "and every second layer of gpt-oss has a window; `auto` uses it where it can serve"
            )
        if self.attention_backend != "auto" and not self.flash_attention:
            raise ValueError(
                f"attention_backend: {self.attention_backend} needs flash_attention: true"
            )
        return self

    @model_validator(mode="after")
    def _check_expert_adapters(self) -> Config:
        targets, rank = self.lora.expert_targets, self.lora.expert_r
        if len(set(targets)) < len(targets):
            raise ValueError(f"lora.expert_targets: {', '.join(targets)} names a weight twice")
        if targets and rank is None:
            raise ValueError("lora.expert_targets need lora.expert_r, the rank of their adapters")
        if rank is not None and not targets:
            raise ValueError(
                f"lora.expert_r: {rank} is the rank of nothing while lora.expert_targets is empty"
            )
        if targets and self.experts.sparsity != "none":
            raise ValueError(
                f"lora.expert_targets need experts.sparsity: none, not {self.experts.sparsity}: "
                "an expert's adapter would fill the weights that 2:4 has dropped"
            )
        return self

    def nothing_to_keep(self, device: Literal["cuda", "cpu"]) -> dict[str, str]:
        """Which of training.keep_attention and keep_experts can keep nothing on a device: why."""
        keys = ("keep_attention", "keep_experts")
        if not self.training.gradient_checkpointing:
            return dict.fromkeys(keys, "training.gradient_checkpointing is false")
        if device == "cpu":
            return dict.fromkeys(keys, "no GPU: only what a GPU computes can be kept")
        if not self.flash_attention and self.sequence_parallel_degree == 1:
            return {"keep_attention": "flash_attention is false: eager attention keeps nothing"}
        return {}

    @model_validator(mode="after")
    def _check_kept(self) -> Config:
        for key, why in self.nothing_to_keep("cuda").items():
            if getattr(self.training, key) == "always":
                raise ValueError(f"training.{key}: auto or never; there is nothing to keep: {why}")
        return self

    @model_validator(mode="after")
    def _check_steps(self) -> Config:
        training = self.training
        if training.save_steps % training.eval_steps:
            raise ValueError(
                f"training.save_steps ({training.save_steps}) must be a multiple of "
                f"training.eval_steps ({training.eval_steps}): the best checkpoint must exist"
            )
        if training.offload_checkpoints and not training.gradient_checkpointing:
            raise ValueError("training.offload_checkpoints needs training.gradient_checkpointing")
        if training.save_steps % training.logging_steps:
            raise ValueError(
                f"training.save_steps ({training.save_steps}) must be a multiple of "
                f"training.logging_steps ({training.logging_steps}): resumed curves must continue"
            )
        return self


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads a config file and applies `key.path=value` overrides.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown or stands twice, a value has
            the wrong type or is out of range, an override is malformed.
    """
    return load_with_source(path, overrides)[0]


def load_with_source(
    path: str | Path, overrides: list[str] | tuple[str, ...] = ()
) -> tuple[Config, dict[str, Any]]:
    """Like `load`; also returns the nested values that file and overrides set explicitly."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"config file {path} cannot be read",
            "a YAML file",
            str(error),
            "pass --config configs/tiny.yaml, or one of the other files in configs/",
        ) from error
    values, lines = yaml12.parse(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} is not a config", "key: value lines", type(values).__name__, "see configs/"
        )
    fill_sections(values, Config)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", key):
            raise ConfigError(
                f"override {override!r} is malformed",
                "key.path=value, for example training.max_steps=20",
                override,
                "quote it if the shell splits it",
            )
        set_key(values, key, yaml12.parse(value, f"override {key}")[0] if value else "")
        for depth in range(1, key.count(".") + 2):
            lines.pop(tuple(key.split(".")[:depth]), None)
    resolved = json.loads(json.dumps(values))
    for key, value in PROFILES.get(str(values.get("profile", "standard")), {}).items():
        set_key(resolved, key, value, keep=True)
    try:
        return _validate(resolved), values
    except ValidationError as error:
        raise refuse(error, Config, str(path), lines) from error


def _validate(values: dict[str, Any]) -> Config:
    """Validates in JSON mode: lists stand for tuples, and types stay strict."""
    return Config.model_validate_json(json.dumps(values))


def dump(config: Config) -> str:
    """The resolved config as YAML text that `load` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def hash_sections(config: Config, keys: Iterable[str]) -> str:
    """Return a hash (16 hex digits) of the named top-level keys.

    Keys that decide no result are left out, wherever they stand.
    """
    values = deciding_values(config)
    picked = {key: values[key] for key in sorted(keys) if key in values}
    return hashlib.sha256(json.dumps(picked, sort_keys=True).encode()).hexdigest()[:16]
