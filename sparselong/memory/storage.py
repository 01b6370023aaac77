"""Bytes of the weights, on disk and packed in memory: exact arithmetic.

A weight takes the bits of its code if it is kept, its share of a 2:4 pattern and that of a scale:

    2:4 pattern    3 bits per group of four (six patterns of two kept)         0.75 bit per weight
    integer codes  4 or 8 bits per kept weight, one bf16 scale per group       16 / group_size
    MXFP4          4 bits per kept weight, one 8-bit E8M0 scale per 32         0.25 bit per weight

2:4 int4 in groups of 64 is therefore 2 + 0.75 + 0.25 = 3.0 bits per weight, MXFP4 4.25, MXFP4 2:4
3.0, 2:4 int8 5.0 and 2:4 bf16 8.75. Headers, tokenizer and config files (about 30 MB for the
published models) are not counted.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from sparselong.config import Config
from sparselong.memory.shape import ModelShape, drop_experts

BF16_BYTES = 2
BF16_BITS = 16
_PATTERN_BITS = 0.75
LINKED_STALE_SHARE = 0.05
_LORA_BYTES = {"float32": 4, "bfloat16": 2}
_ADAM_BYTES = 8
_8BIT_BYTES = {"adamw_bnb_8bit": 2, "lion_8bit": 1}
LOCKED_PER_TABLE_BYTE = 512
"""Bytes of page-locked host memory for each byte of page tables on the GPU: 4 KiB for 8 bytes. With
58 GiB locked, an H200's context took 0.18 GiB more than CONTEXT_BYTES."""


Placement = Literal["gpu", "host"]


class Held(NamedTuple):
    """How processes hold the experts in memory.

    Attributes:
        expert_parallel: number of processes that share one copy of experts and vocabulary.
        placement: where blocks and scales of the experts are.
    """

    expert_parallel: int = 1
    placement: Placement = "gpu"


WHOLE = Held()


def dense_bits(weight_bits: int, sparsity: str, group_size: int) -> float:
    """Return bits per weight of a shared dense layer in our format."""
    kept = weight_bits / 2 + _PATTERN_BITS if sparsity == "2:4" else float(weight_bits)
    return kept + (BF16_BITS / group_size if weight_bits < BF16_BITS else 0.0)


def expert_bits(sparsity: str) -> float:
    """Return bits per expert weight: MXFP4 as published, or 2:4 of it."""
    return (2 + _PATTERN_BITS if sparsity == "2:4" else 4.0) + 8 / 32


def expert_bytes(shape: ModelShape) -> int:
    """Return bytes of all experts' blocks and scales as loaded: 2:4 experts are expanded."""
    return int(shape.expert_weights * expert_bits("none") / 8)


def held_experts(shape: ModelShape, held: Held, on_cpu: bool) -> dict[str, int]:
    """Return bytes of a process's blocks and scales by component, in its device's memory.

    Of experts in host memory, two layers are on the device, and the page tables of that memory.
    """
    whole = expert_bytes(shape) // held.expert_parallel
    if held.placement == "gpu":
        return {"experts": whole}
    buffers = {"experts": whole if on_cpu else 0, "expert_buffers": 2 * whole // shape.layers}
    if on_cpu:
        return buffers
    locked = whole + embedding_host_bytes(shape, held)
    return {**buffers, "page_tables": locked // LOCKED_PER_TABLE_BYTE}


def embedding_host_bytes(shape: ModelShape, held: Held) -> int:
    """Return bytes of an embedding in host memory: one that is not shared, if the experts are."""
    is_there = held.placement == "host" and held.expert_parallel == 1
    return shape.embedding * BF16_BYTES if is_there else 0


def base_groups(shape: ModelShape) -> dict[str, int]:
    """Return bytes of the upstream checkpoint (MXFP4 experts, bf16 rest) by group in LABELS."""
    return _groups(shape, expert_bits("none"), BF16_BITS)


def compressed_groups(shape: ModelShape, config: Config) -> dict[str, int]:
    """Return bytes of the compressed model by group."""
    bits = bits_by_group(config)
    return _groups(shape, bits["experts"], bits["attention"])


def bits_by_group(config: Config) -> dict[str, float]:
    """Return bits per weight of the compressed model by group."""
    dense = config.shared_dense
    return {
        "experts": expert_bits(config.experts.sparsity),
        "attention": dense_bits(dense.weight_bits, dense.sparsity, dense.group_size),
        "embedding": float(BF16_BITS),
        "small": float(BF16_BITS),
    }


def _groups(shape: ModelShape, expert: float, attention: float) -> dict[str, int]:
    return {
        "experts": int(shape.expert_weights * expert / 8),
        "attention": int(shape.attention_weights * attention / 8),
        "embedding": 2 * shape.embedding * BF16_BYTES,
        "small": shape.small * BF16_BYTES,
    }


def masters_bytes(shape: ModelShape, config: Config) -> int:
    """Return bytes of the dense bf16 masters that stage 02 writes for stage 03."""
    dense = config.shared_dense
    if dense.weight_bits == BF16_BITS and dense.sparsity == "none":
        return 0
    return shape.attention_weights * BF16_BYTES


def adapted_bytes(shape: ModelShape, config: Config) -> int:
    """Return bytes that the adapted layers hold in memory in addition to their packed weights.

    They are the bf16 master and copies of masks and scales, which change during training. A plain
    bf16 layer is its own master.
    """
    dense = config.shared_dense
    if dense.weight_bits == BF16_BITS and dense.sparsity == "none":
        return 0
    bits = BF16_BITS + (_PATTERN_BITS if dense.sparsity == "2:4" else 0.0)
    bits += BF16_BITS / dense.group_size if dense.weight_bits < BF16_BITS else 0.0
    return int(shape.layers * adapted_weights(shape, config) * bits / 8)


def adapted_weights(shape: ModelShape, config: Config) -> int:
    """Return the number of weights of the adapted projections in one decoder layer."""
    return sum(
        rows * columns
        for name, (rows, columns) in shape.projections.items()
        if name in config.lora.target_modules
    )


def lora_parameters(shape: ModelShape, config: Config) -> int:
    """Return the number of parameters of all adapters: projections, experts and routers."""
    lora = config.lora
    sizes = [shape.projections[name] for name in lora.target_modules if name in shape.projections]
    if lora.router:
        sizes.append((shape.experts, shape.hidden))
    dense = lora.r * sum(rows + columns for rows, columns in sizes)
    return shape.layers * dense + expert_lora_parameters(shape, config)


def expert_lora_parameters(shape: ModelShape, config: Config) -> int:
    """Return the number of parameters of the experts' adapters."""
    lora = config.lora
    widths = {
        "gate_up_proj": 2 * shape.intermediate + shape.hidden,
        "down_proj": shape.hidden + shape.intermediate,
    }
    each = (lora.expert_r or 0) * sum(widths[name] for name in lora.expert_targets)
    return shape.layers * shape.experts * each


def adapter_bytes(shape: ModelShape, config: Config) -> int:
    """Return bytes of all adapters: fp32, those of experts in `lora.expert_dtype`."""
    experts = expert_lora_parameters(shape, config)
    dense = lora_parameters(shape, config) - experts
    return dense * _LORA_BYTES["float32"] + experts * _LORA_BYTES[config.lora.expert_dtype]


def trained_bytes(
    shape: ModelShape, config: Config, expert_parallel: int = 1, *, gradients: bool = True
) -> int:
    """Return bytes of a process's adapters and optimizer states, and of their gradients.

    Args:
        shape: sizes of the base model.
        config: the config of the run.
        expert_parallel: number of processes that share the experts, and so their adapters.
        gradients: whether to count the gradients, which no checkpoint holds.
    """
    experts = expert_lora_parameters(shape, config)
    dense = lora_parameters(shape, config) - experts
    return sum(
        count * (_LORA_BYTES[dtype] * (1 + gradients) + optimizer_bytes(config, dtype))
        for count, dtype in (
            (dense, "float32"),
            (experts // expert_parallel, config.lora.expert_dtype),
        )
    )


def optimizer_bytes(config: Config, dtype: str = "float32") -> int:
    """Return bytes of optimizer state per trainable parameter of a type.

    torch's AdamW keeps two moments in the parameter's type, the 8-bit one two bytes, Lion one.
    """
    if config.training.is_8bit:
        return _8BIT_BYTES[config.training.optimizer]
    return _ADAM_BYTES * _LORA_BYTES[dtype] // _LORA_BYTES["float32"]


def checkpoint_bytes(shape: ModelShape, config: Config) -> int:
    """Return bytes of a training checkpoint: adapters, optimizer state and masks, not the base."""
    masks = int(shape.attention_weights * _PATTERN_BITS / 8)
    state = trained_bytes(shape, config, gradients=False)
    return state + (masks if config.shared_dense.sparsity == "2:4" else 0)


def disk_bytes(shape: ModelShape, config: Config) -> dict[str, int]:
    """Return bytes on disk of everything that the stages write, by artifact (a key of LABELS).

    Args:
        shape: sizes of the base model, with all its experts.
        config: the config of the run.
    """
    base, shape = shape, drop_experts(shape, config)
    model = sum(compressed_groups(shape, config).values())
    return {
        "base": sum(base_groups(base).values()),
        "compressed_model": model,
        "compressed_masters": masters_bytes(shape, config),
        "finetuned_model": model,
        "finetune_checkpoints": (config.training.save_total_limit + 1)
        * checkpoint_bytes(shape, config),
        "adapter": adapter_bytes(shape, config),
    }


def linkable_bytes(shape: ModelShape, config: Config) -> dict[str, int]:
    """Return bytes of each model that take no disk space if shards can be hard links.

    Stage 02 links an upstream shard if at most 5 % of it is replaced (attention): true of
    gpt-oss-120b (2.9 %), but not of gpt-oss-20b (9.3 %), and never if its experts change. Stage 03
    links the shards that it does not change; none if experts or routers have adapters, because
    their weights are in the same shards. `shape` has all of the base's experts.
    """
    packed = compressed_groups(drop_experts(shape, config), config)
    untouched = sum(packed.values()) - packed["attention"]
    base = base_groups(shape)
    stale = base["attention"] if packed["attention"] != base["attention"] else 0
    if config.experts.sparsity != "none" or config.experts.keep is not None:
        stale += base["experts"]
    links = stale <= LINKED_STALE_SHARE * sum(base.values())
    return {
        "compressed_model": untouched if links else 0,
        "finetuned_model": 0 if config.lora.expert_targets or config.lora.router else untouched,
    }
