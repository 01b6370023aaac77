"""Estimated duration of the stages: operations and bytes over measured rates, and fixed costs.

A token costs two operations per active weight and pass. Training with checkpointing takes three
passes (forward, recomputed forward, gradient of the input). Attention's backward pass counts as 2.5
forward passes, and masked LoRA adds the gradient of the attention projections' weights. The host
needs PASS_SECONDS to start a layer's kernels, which short sequences do not hide.

Stage 02 is a stream (compress/layers.py): a layer takes as long as the slowest of its computation,
reading it, hashing it, and writing its states.

The rates are those of committed results (benchmarks/results) and tests/memory/test_times.py holds
the estimates within 30 % of what was measured. Cards without results have assumed rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

from sparselong.config import Config, GpuType, find_type
from sparselong.memory import evaluated, exchange, storage
from sparselong.memory.shape import ModelShape, drop_experts
from sparselong.memory.stages import (
    compress_batch_tokens,
    layer_bytes,
    state_bytes,
    written_bytes,
)
from sparselong.memory.storage import WHOLE, Held, expert_bytes

EFFICIENCY = 0.6
"""Fraction of the bf16 peak that the kernels reach on cards on which they were measured: training
steps of gpt-oss-20b and -120b (train_step, fit_120b)."""
ASSUMED_EFFICIENCY = 0.4
"""The same on other cards: two thirds of it, because nothing was measured there."""
FP32_EFFICIENCY = 0.7
"""Fraction of the fp32 peak that matrix products reach, for the Hessians (estimate)."""
SOLVE_OPERATIONS = 192.0
"""Operations at the fp32 peak in which stage 02 solves a projection, for each weight and input:
rows times inputs squared (solver)."""
PASS_SECONDS = 0.003
"""What a layer takes in a training step beside its operations: the host's launches (train_step)."""
EXCHANGE_SECONDS = 0.004
"""What a layer's exchange of shared experts takes beside its bytes, in a step (fit_120b)."""
RANK_SECONDS = 20.0
"""What several processes need longer than one to start and meet (true_widths)."""
HASHED_BYTES_PER_SECOND = 1.5e9
"""Rate at which a thread hashes; states and the finished model take HASH_THREADS of them."""
HASH_THREADS = 4
CACHED_BYTES_PER_SECOND = 2.5e9
"""Rate at which a model is opened whose files the system holds in memory (true_widths)."""
ASSUMED_TOKENS = 1_500_000
"""Assumed size of a training set that is not on this machine yet."""
ASSUMED_ITEMS = 10_042
"""Assumed number of items of a task without a limit: hellaswag's validation split."""
ITEM_TOKENS = 400
"""Tokens of an evaluation item, with all four endings."""
SAMPLE_TOKENS = 1_000
"""Tokens of a validation conversation, at most `sequence_len`."""

EXCHANGED_BYTES_PER_SECOND = 23e9
"""Rate at which GPUs without peer access exchange hidden states: NCCL's between four H200 with
NCCL_P2P_DISABLE=1, the regime of PCIe 4.0 x16."""
LINKED_BYTES_PER_SECOND = 277e9
"""The same with NVLink, which cards for data centers are taken to have."""
COPIED_BYTES_PER_SECOND = 23e9
"""Rate at which a GPU copies from page-locked host memory, over PCIe 4.0 x16 (estimate)."""
FAST_COPIED_BYTES_PER_SECOND = 55e9
"""The same over PCIe 5.0 x16 (fit_120b_host)."""
TINY_STEP_TOKENS = 1_024
"""Tokens of a step that makes the small model."""
DEMO_ITEMS = 400
"""Items of the demo's task."""
DEMO_ITEM_TOKENS = 262
"""Tokens of one, with all four endings."""
DEMO_SAMPLE_TOKENS = 190
"""Tokens of one of the demo's validation conversations."""


class Startup(NamedTuple):
    """Seconds that stages take whatever they compute: imports, processes, compilation."""

    compress: float
    finetune: float
    evaluate: float


@dataclass(frozen=True)
class Rate:
    """Speed of a device and of the disk."""

    name: str
    flops_per_second: float
    """Dense bf16 peak of a GPU, or sustained fp32 rate of a CPU."""
    efficiency: float
    fp32_flops_per_second: float
    """Peak without tensor cores, or sustained rate of a CPU."""
    disk_bytes_per_second: float
    startup: Startup
    pass_seconds: float = PASS_SECONDS
    exchanged_bytes_per_second: float = EXCHANGED_BYTES_PER_SECOND
    copied_bytes_per_second: float = COPIED_BYTES_PER_SECOND
    memory_bytes_per_second: float = math.inf
    """Bandwidth of a GPU's memory."""
    decode_layer_seconds: float = 0.0
    """What a layer takes for a generated token at least."""


class Peak(NamedTuple):
    """Operations and bytes per second of a GPU, as its maker says.

    Attributes:
        bf16: dense, with fp32 accumulation.
        fp32: without tensor cores.
        memory: bytes read from the GPU's memory.
    """

    bf16: float
    fp32: float
    memory: float


GPU_PEAKS: dict[GpuType, Peak] = {
    "RTX 3090": Peak(71e12, 35.6e12, 0.936e12),
    "RTX 4090": Peak(165e12, 82.6e12, 1.008e12),
    "RTX 5090": Peak(209e12, 104.8e12, 1.792e12),
    "A6000": Peak(155e12, 38.7e12, 0.768e12),
    "A100": Peak(312e12, 19.5e12, 1.555e12),
    "H100": Peak(990e12, 67e12, 3.35e12),
    "H200": Peak(990e12, 67e12, 4.8e12),
}
MEASURED: tuple[GpuType, ...] = ("H100", "H200")
"""Cards on which the kernels' efficiency was measured."""
_LINKED: tuple[GpuType, ...] = ("A100", "H100", "H200")

GPU_STARTUP = Startup(25.0, 50.0, 13.0)
"""With a GPU (demo-h200, true_widths)."""
CPU = Rate(
    *("2 processor cores", 60e9, 0.5, 60e9, 0.5e9, Startup(15.0, 45.0, 15.0), 0.0),
    decode_layer_seconds=0.0025,
)


def find_rate(gpu_name: str | None) -> Rate:
    """Return the rate of a GPU by name (RTX 3090 if unknown), or of a CPU for None."""
    if gpu_name is None:
        return CPU
    kind = find_type(gpu_name)
    name = gpu_name if kind else "RTX 3090"
    peak = GPU_PEAKS[kind or "RTX 3090"]
    efficiency = EFFICIENCY if kind in MEASURED else ASSUMED_EFFICIENCY
    exchanged = LINKED_BYTES_PER_SECOND if kind in _LINKED else EXCHANGED_BYTES_PER_SECOND
    copied = FAST_COPIED_BYTES_PER_SECOND if kind in MEASURED else COPIED_BYTES_PER_SECOND
    return Rate(
        name,
        peak.bf16,
        efficiency,
        peak.fp32,
        1e9,
        GPU_STARTUP,
        exchanged_bytes_per_second=exchanged,
        copied_bytes_per_second=copied,
        memory_bytes_per_second=peak.memory,
    )


class Estimate(NamedTuple):
    """Time and cost of stages 02 and 03 on one type of GPU.

    Attributes:
        gpu: the type or name, or the processor; of an unknown type also as what it was taken.
        gpus: number of GPUs that stage 03 uses; 0 for a processor.
        seconds: by stage; stage 02 uses one GPU.
        price: of a GPU's hour; None if it is not set.
    """

    gpu: str
    gpus: int
    seconds: dict[str, float]
    price: float | None

    def describe(self, stages: Collection[str] = ("03_finetune",)) -> dict[str, Any]:
        """Return hours, GPU hours and cost (None without a price) of some stages as JSON."""
        counts = {"02_compress": min(1, self.gpus), "03_finetune": self.gpus}
        gpu_hours = sum(self.seconds[name] * counts[name] for name in stages) / 3600
        return {
            "gpu": self.gpu,
            "gpus": self.gpus,
            "hours": sum(self.seconds[name] for name in stages) / 3600,
            "gpu_hours": gpu_hours,
            "cost": None if self.price is None or not self.gpus else gpu_hours * self.price,
        }


def estimate(
    config: Config,
    gpu_name: str | None,
    gpus: int,
    seconds_on: Callable[[Rate], dict[str, float]],
) -> list[Estimate]:
    """Return time and cost on one GPU or processor, or on every type that the config prices.

    Args:
        config: names the prices.
        gpu_name: the GPU; None: the types with a price of their own, or an RTX 3090.
        gpus: number of GPUs that stage 03 uses; 0 for a processor.
        seconds_on: seconds by stage on a device of a rate.
    """
    if not gpus:
        return [Estimate(CPU.name, 0, seconds_on(CPU), None)]
    prices = config.cost.per_gpu_hour
    priced = list(prices) if isinstance(prices, dict) else ["RTX 3090"]
    names = priced if gpu_name is None else [gpu_name]
    shown = {name: name if find_type(name) else f"{name}, taken as an RTX 3090" for name in names}
    return [
        Estimate(shown[name], gpus, seconds_on(find_rate(name)), config.cost.price(name))
        for name in names
    ]


def _judged_flops(shape: ModelShape, config: Config) -> float:
    """Return operations of reading what stage 04 asks of a model."""
    evaluation = config.evaluation
    tasks = len(evaluation.tasks) - len(evaluation.ruler_tasks)
    items, item_tokens = tasks * (evaluation.limit or ASSUMED_ITEMS), ITEM_TOKENS
    sample_tokens = DEMO_SAMPLE_TOKENS if config.data.train == "demo" else SAMPLE_TOKENS
    if config.model.base == "tiny":
        items, item_tokens = min(items, DEMO_ITEMS), DEMO_ITEM_TOKENS
    judged = items * item_tokens
    judged += evaluation.perplexity_samples * min(sample_tokens, config.sequence_len)
    drawn = len(evaluation.ruler_tasks) * min(
        evaluation.ruler.items, evaluation.limit or evaluation.ruler.items
    )
    prompts = (length * sum(forward_flops(shape, length)) for length in evaluation.ruler.lengths)
    return judged * sum(forward_flops(shape, sample_tokens)) + drawn * sum(prompts)


def forward_flops(shape: ModelShape, sequence_len: int) -> tuple[float, float]:
    """Return operations per token of a forward pass: (matrix products, attention scores)."""
    keys = sequence_len / 2 + min(shape.sliding_window, sequence_len)
    return 2.0 * shape.active, shape.layers / 2 * keys * 4 * shape.query_width


def training_flops(shape: ModelShape, config: Config, *, masked_lora: bool = True) -> float:
    """Return operations per trained token; `masked_lora` adds the projections' weight gradients."""
    products, scores = forward_flops(shape, config.sequence_len)
    passes = 3.0 if config.training.gradient_checkpointing else 2.0
    extra = 2.0 * shape.attention_weights if masked_lora else 0.0
    return passes * products + (passes + 1.5) * scores + extra


def training_tokens(config: Config, data_bytes: int | None) -> tuple[int, str]:
    """Return the number of tokens of a training run, and how it was determined.

    Args:
        config: the config of the run.
        data_bytes: size of the training file; None if it is not on this machine.
    """
    training = config.training
    if training.max_steps:
        per_step = training.gradient_accumulation_steps * config.micro_batch_size
        tokens = training.max_steps * per_step * config.sequence_len
        return tokens, f"{training.max_steps} steps of full sequences"
    if data_bytes is not None:
        return int(data_bytes / 4 * training.num_epochs), "4 bytes of data.train per token"
    return int(ASSUMED_TOKENS * training.num_epochs), "data.train is not here yet: 1.5 M assumed"


def training_seconds(
    shape: ModelShape, config: Config, rate: Rate, tokens: int, gpus: int, held: Held
) -> float:
    """Return the seconds of stage 03's steps.

    The exchange of shared experts is counted as if no computation overlapped with it, copies from
    host memory as if all did.

    Args:
        shape: sizes of the base model.
        config: the config of the run.
        rate: speed of the device.
        tokens: number of tokens that are trained on.
        gpus: number of GPUs that compute.
        held: how a GPU holds the experts.
    """
    speed = rate.flops_per_second * rate.efficiency
    exchanged = exchange.sent_bytes(shape, held.expert_parallel) / rate.exchanged_bytes_per_second
    together = max(1, gpus // config.sequence_parallel_degree)
    passes = tokens / (config.micro_batch_size * config.sequence_len * together)
    latency = rate.pass_seconds + (EXCHANGE_SECONDS if held.expert_parallel > 1 else 0.0)
    computed = tokens / gpus * (training_flops(shape, config) / speed + exchanged)
    computed += passes * shape.layers * latency
    if held.placement == "gpu":
        return computed
    copied = 2 * expert_bytes(shape) // held.expert_parallel
    return max(computed, passes * copied / rate.copied_bytes_per_second)


def layer_seconds(shape: ModelShape, config: Config, rate: Rate) -> float:
    """Return the seconds of one layer in stage 02: those of the slowest part of its stream."""
    device = "cpu" if rate is CPU else "cuda"
    tokens = config.calibration.samples * config.calibration.sequence_len
    products, scores = forward_flops(shape, config.calibration.sequence_len)
    experts = (products - 2.0 * (shape.embedding + shape.attention_weights)) / shape.layers
    attention = 2.0 * shape.attention_weights / shape.layers + scores / shape.layers
    makes_up = config.calibration.solver == "sweep"  # what q, k and v changed is measured too
    scores_experts = config.experts.keep is not None
    operations = (1 + scores_experts) * experts + (2 + makes_up + scores_experts) * attention
    computed = tokens * operations / (rate.flops_per_second * rate.efficiency)
    squares = shape.hidden**2 + (1 + makes_up) * shape.query_width**2
    fp32 = rate.fp32_flops_per_second
    computed += 2.0 * tokens * squares / (fp32 * FP32_EFFICIENCY)
    solved = sum(rows * inputs**2 for rows, inputs in shape.projections.values())
    computed += SOLVE_OPERATIONS * solved / fp32
    batches = math.ceil(tokens / compress_batch_tokens(config, device))
    computed += batches * rate.pass_seconds
    # A step takes the base's attention forward, and the refined one forward and backward.
    share = config.calibration.refinement_steps / batches
    computed += share * tokens * 4 * attention / (rate.flops_per_second * rate.efficiency)
    computed += config.calibration.refinement_steps * rate.pass_seconds
    states, layer = state_bytes(shape, config, device), layer_bytes(shape)
    write = (states + written_bytes(shape, config)) / rate.disk_bytes_per_second
    write += states / (HASHED_BYTES_PER_SECOND * HASH_THREADS)
    read = layer / rate.disk_bytes_per_second
    return max(computed, read, layer / HASHED_BYTES_PER_SECOND, write)


def _compress_seconds(shape: ModelShape, config: Config, rate: Rate, disk: dict[str, int]) -> float:
    """Return the seconds of stage 02, with those of making a small base."""
    made = 0.0
    if config.model.base == "tiny":
        products, _ = forward_flops(shape, config.calibration.sequence_len)
        steps = config.model.tiny_steps
        made = steps * TINY_STEP_TOKENS * 3 * products / (rate.flops_per_second * rate.efficiency)
        made += steps * shape.layers * rate.pass_seconds
    # What is not linked is read, written and hashed.
    copied = disk["compressed_model"] - storage.linkable_bytes(shape, config)["compressed_model"]
    finish = 2 * copied / rate.disk_bytes_per_second
    finish += copied / (HASHED_BYTES_PER_SECOND * HASH_THREADS)
    stream = shape.layers * layer_seconds(shape, config, rate)
    return rate.startup.compress + made + stream + finish


def stage_seconds(
    shape: ModelShape,
    config: Config,
    rate: Rate,
    disk: dict[str, int],
    tokens: int,
    *,
    gpus: int = 1,
    held: Held = WHOLE,
    evaluation_held: Held = WHOLE,
) -> dict[str, float]:
    """Return the estimated seconds of each stage.

    Args:
        shape: sizes of the base model, with all its experts.
        config: the config of the run.
        rate: speed of the device and disk.
        disk: bytes by artifact, from storage.disk_bytes.
        tokens: number of tokens that stage 03 trains on.
        gpus: number of GPUs that compute in stages 03 and 04.
        held: how stage 03 holds the experts.
        evaluation_held: how stage 04 holds them.
    """
    speed = rate.flops_per_second * rate.efficiency
    evaluate = _judged_flops(shape, config) / speed / gpus
    evaluate += evaluated.answer_seconds(shape, config, rate, gpus, evaluation_held)
    load = disk["base"] / CACHED_BYTES_PER_SECOND
    ranks = RANK_SECONDS if gpus > 1 else 0.0
    train = training_seconds(drop_experts(shape, config), config, rate, tokens, gpus, held)
    return {
        "01_health": 10.0,
        "02_compress": _compress_seconds(shape, config, rate, disk),
        "03_finetune": rate.startup.finetune + ranks + load + train,
        "04_eval": rate.startup.evaluate + ranks + 3 * (load + evaluate),
    }
