"""Estimated duration of the stages: a roofline model with an assumed efficiency.

A token costs two operations per active weight and pass. Training with checkpointing takes three
passes (forward, recomputed forward, gradient of the input). Attention's backward pass counts as 2.5
forward passes, and masked LoRA adds the gradient of the attention projections' weights. The
efficiency is based on one measurement: transformers trains gpt-oss-20b at 8,398 tokens per second
on an H200, a quarter of the arithmetic limit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

from sparselong.config import Config, GpuType, find_type
from sparselong.memory import exchange
from sparselong.memory.shape import ModelShape, drop_experts
from sparselong.memory.storage import WHOLE, Held, expert_bytes

EFFICIENCY = 0.2
"""Fraction of the peak that this version's kernels are assumed to reach."""
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
NCCL_P2P_DISABLE=1, the regime of PCIe 4.0 x16 (with NVLink 277e9)."""
COPIED_BYTES_PER_SECOND = 23e9
"""Rate at which a GPU copies from page-locked host memory, over PCIe 4.0 x16 (estimate)."""
TINY_STEP_TOKENS = 1_024
"""Tokens of a step that makes the small model."""
DEMO_ITEMS = 400
"""Items of the demo's task."""


@dataclass(frozen=True)
class Rate:
    """Speed of a device and of the disk."""

    name: str
    flops_per_second: float
    """Dense bf16 peak of a GPU, or sustained fp32 rate of a CPU."""
    efficiency: float
    disk_bytes_per_second: float
    startup_seconds: float
    """Imports and start-up of a process."""


GPU_PEAKS: dict[GpuType, float] = {
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
    "RTX 5090": 209e12,
    "A6000": 155e12,
    "A100": 312e12,
    "H100": 990e12,
    "H200": 990e12,
}
"""Dense bf16 operations per second with fp32 accumulation."""

CPU = Rate("2 processor cores", 60e9, 0.5, 0.5e9, 15.0)


def find_rate(gpu_name: str | None) -> Rate:
    """Return the rate of a GPU by name (RTX 3090 if unknown), or of a CPU for None."""
    if gpu_name is None:
        return CPU
    kind = find_type(gpu_name)
    name = gpu_name if kind else "RTX 3090"
    return Rate(name, GPU_PEAKS[kind or "RTX 3090"], EFFICIENCY, 1e9, 30.0)


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


def _training_seconds(
    shape: ModelShape, config: Config, speed: float, tokens: int, gpus: int, held: Held
) -> float:
    """Return the seconds of stage 03's steps; `speed` is in operations per second."""
    exchanged = exchange.sent_bytes(shape, held.expert_parallel) / EXCHANGED_BYTES_PER_SECOND
    computed = tokens / gpus * (training_flops(shape, config) / speed + exchanged)
    if held.placement == "gpu":
        return computed
    passes = tokens / (config.micro_batch_size * config.sequence_len)
    copied = 2 * expert_bytes(shape) // held.expert_parallel
    return max(computed, passes * copied / COPIED_BYTES_PER_SECOND)


def stage_seconds(
    shape: ModelShape,
    config: Config,
    rate: Rate,
    disk: dict[str, int],
    tokens: int,
    *,
    gpus: int = 1,
    held: Held = WHOLE,
) -> dict[str, float]:
    """Return the estimated seconds of each stage.

    The exchange of shared experts is counted as if no computation overlapped with it, copies from
    host memory as if all did.

    Args:
        shape: sizes of the base model, with all its experts.
        config: the config of the run.
        rate: speed of the device and disk.
        disk: bytes by artifact, from storage.disk_bytes.
        tokens: number of tokens that stage 03 trains on.
        gpus: number of GPUs that compute in stages 03 and 04.
        held: how stage 03 holds the experts.
    """
    speed = rate.flops_per_second * rate.efficiency
    trained = drop_experts(shape, config)
    train = _training_seconds(trained, config, speed, tokens, gpus, held)
    tiny = config.model.base == "tiny"
    calibration = config.calibration.samples * config.calibration.sequence_len
    products, scores = forward_flops(shape, config.calibration.sequence_len)
    widths = (3 * shape.hidden**2 + shape.query_width**2) * shape.layers
    solve = 2.0 * widths * calibration + 20.0 * shape.attention_weights * shape.query_width
    passes = 2 if config.experts.keep is None else 3  # one to score the experts
    compress = passes * calibration * (products + scores) + solve
    made = config.model.tiny_steps * TINY_STEP_TOKENS * 3 * products if tiny else 0.0
    moved = disk["base"] + disk["compressed_model"]
    items = len(config.evaluation.tasks) * (config.evaluation.limit or ASSUMED_ITEMS)
    if tiny:
        items = min(items, DEMO_ITEMS)
    judged = items * ITEM_TOKENS
    judged += config.evaluation.perplexity_samples * min(SAMPLE_TOKENS, config.sequence_len)
    evaluate = 3 * judged * sum(forward_flops(shape, SAMPLE_TOKENS))
    load = disk["base"] / rate.disk_bytes_per_second
    start = rate.startup_seconds
    return {
        "01_health": 10.0,
        "02_compress": start + (made + compress) / speed + moved / rate.disk_bytes_per_second,
        "03_finetune": 3 * start + train + load,
        "04_eval": 2 * start + evaluate / speed / gpus + 3 * load,
    }
