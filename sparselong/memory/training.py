"""Peak memory of fine-tuning one device, by component.

Weights are exact; activations are estimates from what each operation must keep. The loss is what
kernels/cross_entropy.py allocates: the logits of one chunk of rows, then the gradient of the hidden
states in fp32 for a moment, and never a sequence's logits; on an H200 it took 0.35 GiB at 16,384
supervised tokens. It is alive together with the checkpoints, but not together with a layer's
recomputed activations, so the peak counts the larger of the two.

That whole-model peaks add up is tied to measurements of gpt-oss-20b under transformers on one GPU
(bf16, checkpointing, batch 1): 48.9, 58.8 and 78.4 GiB at 4,096, 8,192 and 16,384 tokens, where the
loss holds 12 bytes per token and vocabulary entry (tests/test_memory.py).

This version keeps the whole model and the whole sequence on one device. What a card needs once
experts, vocabulary and sequence are shared by `sequence_parallel_degree` ranks is computed beside
it: `sharded=True`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparselong.config import Config
from sparselong.memory import storage
from sparselong.memory.shape import ModelShape

Device = Literal["cuda", "cpu"]

GIB = 2**30
CUDA_OVERHEAD_BYTES = int(1.3 * GIB)
"""CUDA context, NCCL buffers and allocator fragmentation (estimate)."""
CPU_OVERHEAD_BYTES = GIB
"""Python with torch, transformers and axolotl imported (estimate)."""
LOSS_CHUNK_ROWS = 512
"""Rows whose logits exist at once: kernels.cross_entropy's CHUNK_ROWS."""
LOSS_CHUNK_WIDTHS = {"cuda": 1, "cpu": 3}
"""Copies of a chunk's logits: a GPU's kernel works in place, torch takes two temporaries."""
LOSS_ROW_BYTES = 8
"""Per hidden value of a supervised token: its gradient in bf16, in fp32, and scaled (measured)."""
EXPERT_WIDTHS = 10
"""Live activations of a token's copy in an expert, in intermediate widths (estimate)."""
EAGER_COPIES = 5
"""Copies of the score matrix in eager attention: scores, sink column, softmax, gradients."""
ADAPTED_WEIGHT_BYTES = 24
"""Per weight of the adapted projection at work: sum, codes, rounded weight, gradient (estimate)."""

COMPRESS_BATCH_TOKENS = 4096
"""Calibration tokens that stage 02 runs through a layer at once."""
EVALUATED_TOKENS = 1024
"""Length of the conversations that stage 04 is planned for."""
EVALUATE_BATCH_TOKENS = 16_384
"""Most tokens that stage 04 runs through a model at once."""

ALTERNATIVES = ("live layer activations", "attention", "logits and cross-entropy")
"""Components that are not all alive at once; see `peak_bytes`."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device by component."""

    device: Device
    devices: int
    components: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        """The most that is alive at once: the larger of the loss and one layer, plus the rest."""
        layer, attention, loss = (self.components[name] for name in ALTERNATIVES)
        return sum(self.components.values()) - min(layer + attention, loss)


def finetune_memory(
    shape: ModelShape, config: Config, device: Device = "cuda", *, sharded: bool = False
) -> Memory:
    """Memory of stage 03 on each device.

    Args:
        device: `cuda` computes in bf16, `cpu` in fp32.
        sharded: false is what this version does, everything on one device; true is what each of
            `sequence_parallel_degree` ranks needs when experts, vocabulary and sequence are shared.
    """
    ranks = config.sequence_parallel_degree if sharded else 1
    width = 2 if device == "cuda" else 4
    tokens = config.micro_batch_size * -(-config.sequence_len // ranks)
    return Memory(
        device,
        ranks,
        {
            **_weights(shape, config, width, ranks),
            **_trained(shape, config),
            **_activations(shape, config, tokens, width),
            "logits and cross-entropy": _loss(shape, tokens, device),
            "decoded weights at work": _decoded(shape, width),
            **_overhead(device),
        },
    )


def _overhead(device: Device) -> dict[str, int]:
    if device == "cuda":
        return {"CUDA context, NCCL, fragmentation": CUDA_OVERHEAD_BYTES}
    return {"Python and libraries": CPU_OVERHEAD_BYTES}


def _weights(shape: ModelShape, config: Config, width: int, ranks: int) -> dict[str, int]:
    packed = storage.compressed_groups(shape, config)
    unpacked = width // storage.BF16_BYTES  # fp32 copies of what the file holds in bf16
    shared_biases = shape.expert_biases * storage.BF16_BYTES
    small = packed["router, norms, biases, sinks"] - shared_biases + shared_biases // ranks
    return {
        "experts": packed["experts"] // ranks,
        "attention projections, packed": packed["attention"],
        "embedding and lm_head": packed["embedding and lm_head"] * unpacked // ranks,
        "router, norms, biases, sinks": small * unpacked,
    }


def _trained(shape: ModelShape, config: Config) -> dict[str, int]:
    parameters = storage.lora_parameters(shape, config)
    return {
        "masters of the LoRA layers": storage.masters_bytes(shape, config),
        "LoRA, gradients, optimizer": parameters * (4 + 4 + storage.optimizer_bytes(config)),
    }


def _activations(shape: ModelShape, config: Config, tokens: int, width: int) -> dict[str, int]:
    copies = tokens * shape.experts_per_token
    live = copies * EXPERT_WIDTHS * shape.intermediate * width
    attention = 2 * _attention(shape, config, tokens, width)
    if config.training.gradient_checkpointing:
        kept = shape.layers * tokens * shape.hidden * width
    else:
        kept = (shape.layers - 1) * (live + attention)
    return {
        "activation checkpoints"
        if config.training.gradient_checkpointing
        else "activations of the other layers": kept,
        "live layer activations": live,
        "attention": attention,
    }


def _attention(shape: ModelShape, config: Config, tokens: int, width: int) -> int:
    """Queries, output and their log-sum-exp of the rank's tokens; keys and values of all."""
    gathered = config.micro_batch_size * config.sequence_len
    widened = 4 * (shape.hidden + shape.query_width) // 2  # the LoRA layer's fp32 rows, once
    own = tokens * (2 * shape.query_width * width + 4 * shape.heads + widened)
    kept = own + gathered * 2 * shape.kv_width * width
    if config.flash_attention:
        return kept
    scores = tokens * config.sequence_len * shape.heads * width
    return kept + scores * EAGER_COPIES // 2  # the caller doubles for the gradients


def _loss(shape: ModelShape, tokens: int, device: Device) -> int:
    """The forward pass holds a chunk's logits beside the supervised rows and their gradient; the
    backward pass the gradient three times. Every token counts as supervised."""
    width = 2 if device == "cuda" else 4
    chunk = min(tokens, LOSS_CHUNK_ROWS) * shape.vocab * width * LOSS_CHUNK_WIDTHS[device]
    rows = tokens * shape.hidden
    return max(chunk + 2 * rows * width, rows * (LOSS_ROW_BYTES if device == "cuda" else 3 * width))


def _decoded(shape: ModelShape, width: int) -> int:
    """The larger of one expert's gate_up with its temporaries and one adapted projection."""
    expert = 3 * 2 * shape.intermediate * shape.hidden * width
    largest = max(rows * columns for rows, columns in shape.projections.values())
    return max(expert, largest * ADAPTED_WEIGHT_BYTES)


def largest_sequence_len(
    shape: ModelShape, config: Config, budget_bytes: int, device: Device = "cuda"
) -> int:
    """The longest sequence (a multiple of 128 tokens, at most `sequence_len`) whose fine-tuning
    fits the budget on one device in this version; 0 when none does."""

    def fits(blocks: int) -> bool:
        shorter = config.model_copy(update={"sequence_len": blocks * 128})
        return finetune_memory(shape, shorter, device).peak_bytes <= budget_bytes

    low, high = 0, config.sequence_len // 128
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * 128


def compress_memory(shape: ModelShape, config: Config, device: Device) -> dict[str, int]:
    """Bytes of stage 02 on its device by component: one layer at work on a batch of calibration
    tokens, under eager attention, and one Hessian with its inverse and factors."""
    width = 2 if device == "cuda" else 4
    length = config.calibration.sequence_len
    tokens = max(COMPRESS_BATCH_TOKENS, length)
    scores = tokens * length * shape.heads * width
    inputs = max(shape.hidden, shape.query_width)
    return {
        "one layer's weights": layer_bytes(shape),
        "Hessian, inverse, factors": 4 * 8 * inputs**2,
        "live layer activations": tokens
        * shape.experts_per_token
        * EXPERT_WIDTHS
        * shape.intermediate
        * width,
        "attention": EAGER_COPIES * scores,
        "decoded weights at work": _decoded(shape, width),
        **_overhead(device),
    }


def compress_host_memory(shape: ModelShape, config: Config, device: Device) -> dict[str, int]:
    """Bytes of stage 02 in host memory beside the device's work: the layer that is read, and the
    calibration tokens' hidden states before and after it (and once more while they are saved)."""
    return {
        "the layer that is read": layer_bytes(shape),
        "calibration hidden states": 3 * state_bytes(shape, config, device),
    }


def state_bytes(shape: ModelShape, config: Config, device: Device) -> int:
    """Bytes of the calibration tokens' hidden states between two layers."""
    width = 2 if device == "cuda" else 4
    return config.calibration.samples * config.calibration.sequence_len * shape.hidden * width


def layer_bytes(shape: ModelShape) -> int:
    """Bytes of one layer of the base checkpoint."""
    whole = sum(storage.base_groups(shape).values())
    return (whole - 2 * shape.embedding * storage.BF16_BYTES) // shape.layers


def evaluate_memory(shape: ModelShape, config: Config, device: Device) -> dict[str, int]:
    """Bytes of stage 04 by component, for the largest of its three models: the base.

    Its attention is eager, so that conversations longer than EVALUATED_TOKENS need more than this.
    """
    width = 2 if device == "cuda" else 4
    unpacked = width // storage.BF16_BYTES
    base = storage.base_groups(shape)
    length = min(config.sequence_len, EVALUATED_TOKENS)
    tokens = min(EVALUATE_BATCH_TOKENS, config.evaluation.batch_size * length)
    answers = config.evaluation.batch_size * min(length, 256)
    return {
        "experts": base["experts"],
        "the rest of the base model": (sum(base.values()) - base["experts"]) * unpacked,
        "live layer activations": tokens * shape.experts_per_token * 4 * shape.intermediate * width,
        "eager attention": 3 * shape.heads * tokens * length * width,
        "logits": max(answers * 8, LOSS_CHUNK_ROWS * width * LOSS_CHUNK_WIDTHS[device])
        * shape.vocab,
        "decoded weights at work": _decoded(shape, width),
        **_overhead(device),
    }
