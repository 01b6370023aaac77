"""The config schema: every key a user can set, with its meaning, unit and choices.

A config is a YAML file. It is read strictly: an unknown key, a repeated key or a value of the wrong
type raises an error with the line number, the closest known key and what to write instead. The
docstring under each field is its documentation: `python -m sparselong.config.docs` generates from
it the comments in the shipped YAML files and `configs/schema.json` (for editors), and a test fails
if they are out of date. A key marked `Incidental` does not affect results and may be changed when
resuming a run.

Values come from the schema's defaults, the profile, the file and `key.path=value` arguments on the
command line. Later sources override earlier ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from sparselong.config import yaml12
from sparselong.config.cost import CostSection
from sparselong.config.data import DataSection
from sparselong.config.evaluation import EvaluationSection
from sparselong.config.keys import (
    Incidental,
    Section,
    fill_sections,
    pick_sections,
    set_key,
)
from sparselong.config.overrides import apply_overrides
from sparselong.config.profiles import PROFILES
from sparselong.config.refusals import refuse, refuse_undecodable
from sparselong.config.rules import check_rules
from sparselong.config.texts import Place, Text, check_place
from sparselong.config.training import TrainingSection
from sparselong.config.values import Count, Length, Positive, Scale
from sparselong.errors import ConfigError

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj"]
Solver = Literal["sweep", "llmcompressor"]


class ModelSection(Section):
    """Base model to compress and fine-tune."""

    base: Place = "openai/gpt-oss-120b"
    """Base checkpoint: a hub name, a local directory in openai/gpt-oss's format (experts in MXFP4,
    everything else in bf16), or `tiny` for a small gpt-oss that stage 02 creates and trains."""
    revision: Text = "main"
    """Branch, tag or commit of the base checkpoint on the hub."""
    tiny_layers: Positive = 4
    """Number of layers in the `tiny` model."""
    tiny_steps: Count = 600
    """Optimizer steps for which the `tiny` model is trained before compression."""


class SharedDenseSection(Section):
    """Storage format of the dense layers that every token passes through (q, k, v and o)."""

    weight_bits: Literal[4, 8, 16] = 4
    """Bits per kept weight: 4 or 8 (symmetric integers, one bf16 scale per group) or 16 (bf16)."""
    sparsity: Literal["2:4", "none"] = "2:4"
    """`2:4` keeps two of every four consecutive input weights; `none` keeps all."""
    group_size: Literal[32, 64] = 64
    """Number of consecutive input weights that share one scale."""


class ExpertsSection(Section):
    """Storage format of the experts (98 % of the weights), and where they are in memory."""

    weight_bits: Literal[4] = 4
    """Bits per expert weight. The published MXFP4 values are kept bit-exactly."""
    sparsity: Literal["none", "2:4"] = "none"
    """`2:4` drops the two smallest of every four expert weights (3.0 bits per weight instead of
    4.25) and keeps the others bit-exactly. Without long fine-tuning it reduces quality."""
    keep: Positive | None = None
    """Experimental: number of experts that stage 02 keeps in each layer; null keeps all. It removes
    those whose outputs matter least to the calibration tokens (mean of routing weight times norm of
    the output, as in REAP) and copies the others' bytes. All stages and exports take the smaller
    model. Calibration text needs answers in the form in which the model should give them."""
    placement: Annotated[Literal["auto", "gpu", "host"], Incidental()] = "auto"
    """`host` keeps experts in page-locked host memory, each process its own, and copies layers to
    the GPU ahead of use: the same results, but a step takes at least as long as copying all experts
    twice. An embedding that is not shared is there too. `auto` takes the first that fits: whole on
    each GPU, shared, in host memory."""


class CalibrationSection(Section):
    """Text that stage 02 runs through the model to measure which weights matter."""

    samples: Positive = 128
    """Number of calibration sequences, taken from the training data."""
    sequence_len: Length = 2048
    """Length of a calibration sequence, in tokens."""
    dampening: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.01
    """Fraction of the Hessian's mean diagonal that is added to the diagonal before inversion."""
    solver: Solver = "sweep"
    """How 2:4 masks and codes are found. `sweep` chooses both in one sweep over the columns, after
    fitting the weights to a draft of the mask; `o_proj` also makes up for what the compressed
    queries, keys and values changed in its inputs. `llmcompressor` prunes with its SparseGPT, then
    rounds by GPTQ: slower, with larger errors, for comparison."""
    refinement_steps: Annotated[int, Field(ge=0)] = 60
    """Gradient steps by which each layer's compressed projections are then drawn towards the base's
    attention; 0 keeps the solver's result."""


class LoraSection(Section):
    """Low-rank adapters on the dense layers and, optionally, on experts and routers.

    Adapters on dense layers and routers are trained through the 2:4 mask and the rounding.
    """

    r: Positive = 16
    """Rank of the adapters."""
    alpha: Scale = 32.0
    """Adapter outputs are scaled by alpha / r."""
    target_modules: Annotated[tuple[Projection, ...], Field(min_length=1)] = get_args(Projection)
    """Attention projections that get an adapter: any of `q_proj`, `k_proj`, `v_proj`, `o_proj`."""
    expert_targets: tuple[Literal["gate_up_proj", "down_proj"], ...] = ()
    """Expert weights that get an adapter in every expert: `gate_up_proj`, `down_proj`, both or
    none. Training adds the adapter to the MXFP4 weights without rounding the sum. The final model
    stores the sum rounded to MXFP4, and the stage reports the error of that rounding."""
    expert_r: Annotated[int, Field(ge=1, le=64)] | None = None
    """Rank of each expert's adapter, required with `expert_targets`. Outputs are scaled by
    alpha / expert_r."""
    expert_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the experts' adapters. `bfloat16` halves the memory of the adapters and of their
    gradients, but updates smaller than 1/512 of a weight are lost. The moments of AdamW are then
    bfloat16 too, and lose changes as small; `adamw_bnb_8bit` has its own format."""
    router: bool = False
    """Whether each layer's router also gets an adapter of rank r."""


class MaskUpdateSection(Section):
    """When and how the 2:4 masks are updated during fine-tuning."""

    update_frequency: Annotated[float, Field(ge=0.0, le=1.0)] = 0.05
    """Interval between mask updates, as a fraction of the training steps; 0 never updates. Masks
    stay fixed during the last interval."""
    criterion: Literal["hysteresis", "magnitude"] = "hysteresis"
    """`hysteresis` restores a pruned weight only if it has gained more than half a quantization
    step over a kept weight since stage 02, so that neither an untrained adapter nor noise changes
    the mask. `magnitude` simply keeps the two largest of every four."""


class ModifiersSection(Section):
    """Updates during training, named as in llmcompressor and applied by this project's callback."""

    MagnitudePruningModifier: MaskUpdateSection = MaskUpdateSection()
    """Updates of the 2:4 masks."""


class Config(Section):
    """A run: model, compression, data, training and evaluation."""

    profile: Literal["quick_test", "standard", "high_quality", "memory_efficient"] = "standard"
    """A set of defaults: `quick_test` shows that everything works, `high_quality` takes longer, and
    `memory_efficient` fits smaller GPUs. Keys that are set explicitly override the profile."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 42
    """Random seed, below 2^32 as NumPy requires."""
    model: ModelSection = ModelSection()
    shared_dense: SharedDenseSection = SharedDenseSection()
    experts: ExpertsSection = ExpertsSection()
    calibration: CalibrationSection = CalibrationSection()
    data: DataSection = DataSection()
    sequence_len: Length = 16384
    """Training context in tokens, summed over all GPUs that share a sequence."""
    sequence_parallel_degree: Annotated[Positive, Incidental()] = 4
    """Number of processes, each with its own GPU, that share one sequence. `python 03_finetune.py`
    starts them on this machine. `torchrun` may start a multiple of that number, the same on
    each of several machines; several sequences are then trained in parallel. `python 04_eval.py`
    starts the same number, but no more than there are GPUs; `torchrun` may start any number."""
    expert_parallel_degree: Annotated[Literal["auto"] | Positive, Incidental()] = "auto"
    """Number of processes of one machine that share one copy of experts and vocabulary, whatever
    sequences they work on. 1: each process holds all of them. A larger number must divide the
    number of processes on a machine and the number of experts. `auto` takes 1 if the planner says
    that the stage then fits the GPUs, otherwise as many processes of the machine as can share;
    01_health and `--dry-run` show both."""
    flash_attention: bool = True
    """Compute attention without a quadratic score matrix (needs a GPU). false uses transformers'
    eager attention, except that a split sequence always uses this project's attention."""
    attention_backend: Literal[
        "auto", "triton", "torch_flash", "torch_cudnn", "flash_attn", "flash_attn_4"
    ] = "auto"
    """Kernels for `flash_attention`. `auto` uses, for each kind of layer, the backend that was
    measured to be fastest on this GPU (01_health says which), or `triton` for all if fine-tuning
    would not otherwise fit: its backward pass needs no fp32 sums. A named backend is used for every
    layer, and the stage fails if it cannot be. `flash_attn` and `flash_attn_4` must be installed;
    the latter needs an H100 or H200. `torch_cudnn` does not support the sliding windows in every
    second layer of gpt-oss, so only `auto` can use it."""
    deterministic: bool = False
    """Make attention's gradients bit-identical in every run. The Triton kernels always are;
    torch_flash's backward pass becomes slower, and torch_cudnn's is not used."""
    micro_batch_size: Positive = 1
    """Sequences per forward pass."""
    heads_k_stride: Annotated[Positive, Incidental()] = 1
    """Number of KV heads gathered at a time when a sequence is split over GPUs; must divide the
    number of KV heads. Larger values need fewer exchanges and more memory. For a full layer on four
    H200s at 16,384 tokens, 8 was fastest with peer access (6.0 ms, 4: 6.6) and 4 without (7.6 ms,
    8: 8.0)."""
    ring_attn_func: Annotated[Literal["varlen_llama3"], Incidental()] = "varlen_llama3"
    """Attention over split sequences: `varlen_llama3` gathers the keys and values of full layers by
    groups of heads; sliding-window layers fetch only the keys just before their shard."""
    lora: LoraSection = LoraSection()
    finetuning_modifiers: ModifiersSection = ModifiersSection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    cost: CostSection = CostSection()

    def nothing_to_keep(
        self, device: Literal["cuda", "cpu"], expert_parallel: int | None = None
    ) -> dict[str, str]:
        """Return why training.keep_attention or keep_experts has no effect, by key.

        Args:
            device: kind of device that trains.
            expert_parallel: number of processes that share the experts; None takes
                `expert_parallel_degree` if that is a number, otherwise 1.
        """
        keys = ("keep_attention", "keep_experts")
        if not self.training.gradient_checkpointing:
            return dict.fromkeys(keys, "training.gradient_checkpointing is false")
        if device == "cpu":
            return dict.fromkeys(keys, "no GPU: only results of GPU kernels can be kept")
        if expert_parallel is None:
            degree = self.expert_parallel_degree
            expert_parallel = 1 if degree == "auto" else degree
        found = {}
        if not self.flash_attention and self.sequence_parallel_degree == 1:
            found["keep_attention"] = "flash_attention is false: eager attention keeps nothing"
        if expert_parallel > 1:
            found["keep_experts"] = (
                f"{expert_parallel} processes share the experts (expert_parallel_degree): each "
                "would keep rows of all of them"
            )
        for key in ("slice_rows", "offload_checkpoints"):
            value = getattr(self.training, key)
            if value not in ("auto", "never", False):
                found["keep_experts"] = (
                    f"training.{key} is {str(value).lower()}: such layers recompute their experts"
                )
        return found

    @model_validator(mode="after")
    def _check_rules(self) -> Config:
        check_rules(self)
        return self


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a config file and apply `key.path=value` overrides.

    Raises:
        ConfigError: the file is missing, empty or not YAML, a key is unknown or repeated, a value
            has the wrong type or is out of range, or an override is malformed.
    """
    return load_with_source(path, overrides)[0]


def load_with_source(
    path: str | Path, overrides: list[str] | tuple[str, ...] = ()
) -> tuple[Config, dict[str, Any]]:
    """Return the config as `load` does, and the nested values that file and overrides set."""
    path = _find(path)
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
    if not values:
        raise ConfigError(
            f"config file {path} is empty",
            "at least one key",
            "no keys",
            "pass another --config; configs/ has complete files to copy",
        )
    fill_sections(values, Config)
    places = {key: f"{path}, line {line}" for key, line in lines.items()}
    apply_overrides(values, overrides, Config, places)
    refuse_undecodable(values, Config, str(path), places)
    resolved = json.loads(json.dumps(values))
    for key, value in PROFILES.get(str(values.get("profile", "standard")), {}).items():
        set_key(resolved, key, value, keep=True)
    try:
        return _validate(resolved), values
    except ValidationError as error:
        raise refuse(error, Config, str(path), places) from error


def _find(path: str | Path) -> Path:
    """Return the path with its home directory expanded."""
    try:
        return Path(check_place(str(path)))
    except ValueError as error:
        raise ConfigError(
            "the name of the config file cannot be used",
            str(error),
            repr(str(path)),
            "pass --config configs/tiny.yaml, or one of the other files in configs/",
        ) from error


def _validate(values: dict[str, Any]) -> Config:
    """Validate in JSON mode, which accepts lists for tuples and is strict otherwise."""
    return Config.model_validate_json(json.dumps(values))


def dump(config: Config) -> str:
    """Return the resolved config as YAML text that `load` reads back to an equal config."""
    return yaml12.dump(config.model_dump(mode="json"))


def is_resolved(text: str) -> bool:
    """Return whether a text has the form in which `dump` writes a config: no comments."""
    try:
        values = yaml12.parse(text, "the text")[0]
    except ConfigError:
        return False
    return isinstance(values, dict) and bool(values) and yaml12.dump(values) == text


def hash_sections(config: Config, keys: Iterable[str]) -> str:
    """Return a hash (16 hex digits) of the named top-level keys.

    Keys that do not affect results are left out at every level.
    """
    picked = pick_sections(config, keys)
    return hashlib.sha256(json.dumps(picked, sort_keys=True).encode()).hexdigest()[:16]
