"""Peak memory of fine-tuning on one device, by component: what the card lends to stage 03.

Weights are exact. Activations are counted from what the kernels allocate, moment by moment; three
moments can be the peak, all while every layer's checkpoint is still there:

    experts     the last layer's backward pass, between gate_up's output and its gradient
    attention   the same layer, in attention's own backward pass (very long sequences)
    loss        the chunked cross-entropy after the last layer (very short ones)

What a layer has made again by then, in hidden (H), query (Q) and key (K) widths a token: the two
norms' outputs and the residual sum 3 H, queries and attention's output 2 Q, keys and values 2 K,
two gradients of H, and the rounded weights of its adapted projections. The experts' pass goes
through slices of at most 16,384 tokens; each choice holds gate_up's output, 2 inner widths, a row
of H and one of dh; the decoded weights take 0.25 GiB beside them. tests/memory runs the real step
without a device, counts every tensor and holds these sums to it; benchmarks/memory.py holds the
whole to a GPU's figures.

Where layers keep their experts' gate_up output, that of all layers is there from the forward pass
on; a slice's goes as soon as its gradients are there, and the layer's before its attention's turn.

What the sums do not see are cuBLAS's workspaces and the CUDA context, constants here, and what the
allocator cannot lend again: gaps between kept attention outputs, and, beside offloading, copies
whose layer the GPU has not gone through yet. Both are set from measurements; gaps between kept
outputs of experts are not counted (0.1 GiB at 4,096 tokens on an H200). Without checkpointing,
without our attention or on a processor the figures are estimates; activations of adapters on
experts are not counted. With `sequence_parallel_degree` ranks each holds the whole model and its
share of the sequence (other ranks' keys and values, one group of heads at a time, are some
megabytes and left out); `sharded=True` computes what a card needs once experts and vocabulary are
shared, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from sparselong.config import Config
from sparselong.memory import storage
from sparselong.memory.shape import ModelShape

Device = Literal["cuda", "cpu"]

GIB = 2**30
ALLOCATOR = "expandable_segments:True"
"""PYTORCH_ALLOC_CONF that `import sparselong` sets: without it a fifteenth of stage 03's memory was
lost to gaps (H200)."""
CONTEXT_BYTES = 806_000_000
"""CUDA context with the kernels loaded (H200, driver 580; smaller GPUs take less)."""
WORKSPACE_BYTES = 122_000_000
"""cuBLAS's workspaces, forward and backward thread (H200; constant from 4,096 to 65,536 tokens)."""
CPU_OVERHEAD_BYTES = GIB
"""Python with torch, transformers and axolotl imported (estimate)."""
LOSS_CHUNK_ROWS = 512
"""Rows whose logits exist at once: kernels.cross_entropy's CHUNK_ROWS."""
LOSS_CHUNK_WIDTHS = {"cuda": 1, "cpu": 3}
"""Copies of a chunk's logits: a GPU's kernel works in place, torch takes two temporaries."""
SLICE_TOKENS = 16_384
"""Tokens that go through a checkpointed layer's experts at once: kernels.expert_gemm's."""
BUFFER_BYTES = 1 << 28
"""Most that decoded expert weights take: kernels.expert_triton's BUFFER_BYTES."""
DECODED_FROM_ROWS = 512
"""Rows an expert above which weights are decoded into that buffer: kernels.expert_choice."""
RESIDENT_CHECKPOINTS = 3
"""Checkpoints that stay on the device when they are offloaded: the embedding's output, which a
gradient is asked of, and the two that were copied last."""
PENDING_CHECKPOINTS = 9
"""Offloaded checkpoints that were copied back, are done with, and cannot be lent again yet: the
host runs ahead of the GPU (H200, 32,768 and 65,536 tokens: 8.6 to 9.1)."""
GAP_SHARE = 1 / 3
"""Gaps by the bytes of kept attention outputs between which they lie (H200: 0.1 to 0.6)."""
EXPERT_WIDTHS = 10
"""Live activations of a token's copy in an expert on a processor, in inner widths (estimate)."""
EAGER_COPIES = 5
"""Copies of the score matrix in eager attention: scores, sink column, softmax, gradients."""
ADAPTED_WEIGHT_BYTES = 24
"""Per weight of the projection at work, in plain torch (estimate)."""

LAYER, EXPERTS, ATTENTION, LOSS = "layer", "experts_work", "attention_work", "loss"
"""Components that take turns, as keys of LABELS."""


class Kept(NamedTuple):
    """What checkpointed layers keep between their two passes; the GPU's kernels can."""

    attention: bool = False
    """Full attention's outputs."""
    experts: bool = False
    """The experts' gate_up output and routing."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device by component, a key of LABELS."""

    device: Device
    devices: int
    components: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        """The most that is alive at once. The loss, a layer's experts and its attention take turns;
        all other components are there throughout."""
        loss, layer, experts, attention = (
            self.components[name] for name in (LOSS, LAYER, EXPERTS, ATTENTION)
        )
        rest = sum(self.components.values()) - loss - layer - experts - attention
        return rest + max(loss, layer + max(experts, attention))


def finetune_memory(
    shape: ModelShape,
    config: Config,
    device: Device = "cuda",
    *,
    sharded: bool = False,
    kept: Kept = Kept(),  # noqa: B008
) -> Memory:
    """Memory of stage 03 on each device.

    Args:
        device: `cuda` computes in bf16, `cpu` in fp32.
        sharded: false is what this version does: ranks share the sequence and nothing else; true
            is what each needs when they share experts and vocabulary, too.
        kept: what layers keep, where device and config let them; `fit.decide_kept` settles what
            the config asks for.
    """
    degree = config.sequence_parallel_degree
    ranks = degree if sharded else 1
    width = 2 if device == "cuda" else 4
    tokens = config.micro_batch_size * -(-config.sequence_len // degree)
    nothing = config.nothing_to_keep(device)
    kept = Kept(
        kept.attention and "keep_attention" not in nothing,
        kept.experts and "keep_experts" not in nothing,
    )
    return Memory(
        device,
        degree,
        {
            **_weights(shape, config, width, ranks),
            **_trained(shape, config),
            **_left(shape, config, tokens, width, kept),
            LAYER: _layer(shape, config, tokens, width, kept),
            EXPERTS: _experts(shape, config, tokens, device, kept),
            ATTENTION: _attention(shape, config, tokens, width, kept),
            LOSS: _loss(shape, tokens, device),
            **_overhead(shape, device),
        },
    )


def _overhead(shape: ModelShape, device: Device) -> dict[str, int]:
    if device == "cuda":
        return {"workspaces": WORKSPACE_BYTES, "context": CONTEXT_BYTES}
    return {"libraries": CPU_OVERHEAD_BYTES, "decoded": decoded(shape, 4)}


def _weights(shape: ModelShape, config: Config, width: int, ranks: int) -> dict[str, int]:
    """As loaded: 2:4 experts are expanded to plain MXFP4, a processor's dense rest is fp32."""
    packed = storage.compressed_groups(shape, config)
    experts = int(shape.expert_weights * storage.expert_bits("none") / 8)
    unpacked = width // storage.BF16_BYTES  # fp32 copies of what the file holds in bf16
    shared_biases = shape.expert_biases * storage.BF16_BYTES
    small = packed["small"] - shared_biases + shared_biases // ranks
    return {
        "experts": experts // ranks,
        "projections": packed["attention"],
        "embedding": packed["embedding"] * unpacked // ranks,
        "small": small * unpacked,
    }


def _trained(shape: ModelShape, config: Config) -> dict[str, int]:
    parameters = storage.lora_parameters(shape, config)
    return {
        "masters": storage.adapted_bytes(shape, config),
        "lora": parameters * (4 + 4 + storage.optimizer_bytes(config)),
    }


def _left(shape: ModelShape, config: Config, tokens: int, width: int, kept: Kept) -> dict[str, int]:
    """What the forward pass leaves of all layers."""
    training = config.training
    if not training.gradient_checkpointing:
        saved = 3 * shape.hidden + 2 * shape.query_width + 2 * shape.kv_width
        saved += shape.experts_per_token * 2 * shape.intermediate
        layer = tokens * saved * width + _scores(shape, config, tokens, width)
        return {"activations": (shape.layers - 1) * layer}
    offloaded = training.offload_checkpoints
    resident = min(shape.layers, RESIDENT_CHECKPOINTS) if offloaded else shape.layers
    checkpoint = tokens * shape.hidden * width
    pending = min(shape.layers - resident, PENDING_CHECKPOINTS) * checkpoint
    attention = shape.full_layers * _kept_attention(shape, tokens) if kept.attention else 0
    return {
        "checkpoints": resident * checkpoint,
        "kept_attention": attention,
        "kept_experts": shape.layers * _kept_experts(shape, tokens) if kept.experts else 0,
        "gaps": pending + int(GAP_SHARE * attention),
    }


def offloaded_bytes(shape: ModelShape, config: Config) -> int:
    """Bytes of pinned host memory that checkpoints are moved to."""
    if not config.training.offload_checkpoints:
        return 0
    moved = max(0, shape.layers - RESIDENT_CHECKPOINTS)
    return moved * config.micro_batch_size * config.sequence_len * shape.hidden * 2


def _kept_attention(shape: ModelShape, tokens: int) -> int:
    """Of one layer: out in bf16 and its log-sum-exp in fp32."""
    return tokens * (2 * shape.query_width + 4 * shape.heads)


def _kept_experts(shape: ModelShape, tokens: int) -> int:
    """Of one layer: gate_up's output in bf16 and the row of each choice."""
    return tokens * shape.experts_per_token * (2 * 2 * shape.intermediate + 4)


def _layer(shape: ModelShape, config: Config, tokens: int, width: int, kept: Kept) -> int:
    """What the last layer's second pass has saved, and two gradients of hidden size."""
    saved = 5 * shape.hidden + 2 * shape.query_width + 2 * shape.kv_width
    routing = shape.experts_per_token * (8 + 2 * width) + 3 * 4 + shape.head_dim * width
    checkpointed = config.training.gradient_checkpointing
    weights = storage.BF16_BYTES * storage.adapted_weights(shape, config) if checkpointed else 0
    both = tokens * (saved * width + 4 * shape.heads + routing) + weights
    # A last layer with full attention is handed what was kept, which is counted there.
    shared = kept.attention and shape.layers % 2 == 0
    return both - (_kept_attention(shape, tokens) if shared else 0)


def _experts(shape: ModelShape, config: Config, tokens: int, device: Device, kept: Kept) -> int:
    """The largest moment of the experts' backward pass."""
    top_k, hidden, inner = shape.experts_per_token, shape.hidden, shape.intermediate
    if device == "cpu":
        return tokens * top_k * EXPERT_WIDTHS * inner * 4
    checkpointed = config.training.gradient_checkpointing
    slices = -(-tokens // SLICE_TOKENS) if checkpointed else 1
    rows = -(-tokens // slices)
    decodes = tokens * top_k > DECODED_FROM_ROWS * shape.experts
    choice = rows * top_k * 2
    wide = 2 * inner * choice  # gate_up's output; a checkpointed layer writes its gradient over it
    before, after = _buffer(shape, 2 * inner * hidden), _buffer(shape, inner * hidden)
    moments = [wide + (hidden + inner) * choice + (after if decodes else 0)]  # dh from rows of dout
    if not checkpointed:
        moments += [2 * wide + inner * choice]  # d gate_up from dh
        moments += [2 * wide + hidden * choice + (before if decodes else 0)]  # rows of dx
    if kept.experts:  # the first slice's, while all slices' gate_up outputs are there
        return max(moments) + rows * top_k * 12 - _kept_experts(shape, rows)
    return max(moments) + rows * top_k * 12


def _buffer(shape: ModelShape, weights: int) -> int:
    """Decoded bf16 weights of as many experts of `weights` each as the limit lets in."""
    return max(1, min(shape.experts, BUFFER_BYTES // (2 * weights))) * 2 * weights


def _attention(shape: ModelShape, config: Config, tokens: int, width: int, kept: Kept) -> int:
    """Attention's backward pass beyond what the layer has saved: gradients of out, queries, keys
    and values, and FlashAttention-2's fp32 sums and gradients of all query heads' keys and values,
    of which Triton's kernels have none. The second norm's output and a gradient of hidden size are
    gone by then, as is what the layer's experts kept."""
    gone = _kept_experts(shape, tokens) if kept.experts else 0
    gradients = 2 * shape.query_width + 2 * shape.kv_width - 2 * shape.hidden
    sums = tokens * shape.query_width * (4 + 2 * width)
    sums = 0 if config.attention_backend == "triton" else sums
    scores = EAGER_COPIES * _scores(shape, config, tokens, width)
    work = tokens * gradients * width + (sums if config.flash_attention else scores)
    return max(0, work - gone)


def _scores(shape: ModelShape, config: Config, tokens: int, width: int) -> int:
    """One score matrix of all heads, where attention is eager."""
    return 0 if config.flash_attention else tokens * config.sequence_len * shape.heads * width


def _loss(shape: ModelShape, tokens: int, device: Device) -> int:
    """The forward pass holds a chunk's logits beside the last layer's output, its norm, the
    supervised rows of it and their gradient; the backward pass the first, and the gradient in bf16,
    in fp32 and scaled. Every token counts as supervised."""
    width = 2 if device == "cuda" else 4
    chunk = min(tokens, LOSS_CHUNK_ROWS) * shape.vocab * width * LOSS_CHUNK_WIDTHS[device]
    rows = tokens * shape.hidden
    return max(chunk + 4 * rows * width, rows * (10 if device == "cuda" else 3 * width))


def decoded(shape: ModelShape, width: int) -> int:
    """The larger of one expert's gate_up with its temporaries and one adapted projection, where
    plain torch decodes them."""
    expert = 3 * 2 * shape.intermediate * shape.hidden * width
    largest = max(rows * columns for rows, columns in shape.projections.values())
    return max(expert, largest * ADAPTED_WEIGHT_BYTES)
