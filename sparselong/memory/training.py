"""Peak device memory of fine-tuning (stage 03), by component.

Weights are exact. Activations are counted from the kernels' allocations at three points of a step,
any of which can be the peak. The checkpoints of all layers are in memory at each of them:

    experts     the last layer's backward pass, between gate_up's output and its gradient
    attention   the same layer, in attention's backward pass (very long sequences)
    loss        the chunked cross-entropy after the last layer (very short ones)

By then the last layer has been recomputed. In hidden (H), query (Q) and key (K) widths per token,
it holds the outputs of both norms and the residual sum (3 H), queries and attention's output (2 Q),
keys and values (2 K), two gradients (2 H) and the rounded weights of its adapted projections. The
experts process slices of at most 16,384 tokens; each routed token holds gate_up's output (2
intermediate sizes), a row of H and one of dh, and decoded weights take another 0.25 GiB.
tests/memory runs the real step without a device, counts every tensor and compares it with these
sums; benchmarks/memory.py compares the total with measurements on a GPU.

If layers keep the experts' gate_up output, those of all such layers exist from the forward pass on.
A slice's output is freed once its gradients exist, the layer's before attention's backward pass.
The last layers of the model keep theirs, so its last layer remains the peak: where the backward
pass reaches layers that keep none, all kept outputs and the later layers' checkpoints are freed.
Where a layer's experts are one slice, the first layer that keeps its output takes no memory: the
last layer's is in memory anyway.

Layers that compute in slices of rows, or whose inputs are in host memory: see slicing.py.

The sums do not include cuBLAS workspaces and the CUDA context, which are constants here, nor
fragmentation between kept attention outputs and in layers with slices, which is set from
measurements. That between kept outputs of experts is not counted (0.1 GiB at 4,096 tokens, H200).
Figures without checkpointing, without our attention or on a CPU are estimates; activations of
adapters on experts are not counted. With several `sequence_parallel_degree` ranks, each holds its
share of the sequence; the keys and values of other ranks (a few megabytes, one group of heads at a
time) are not counted.

With `expert_parallel` above 1, that many processes share one copy of experts and vocabulary. Each
then holds its share of the experts with their biases and adapters (masters, gradients, optimizer
states), and of the rows of embedding and lm_head; projections, masters, router and norms are whole
on each. Experts and loss work on chunks of all processes' rows: see exchange.py. Experts in host
memory leave two layers of a process's blocks and scales on its device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sparselong.config import Config
from sparselong.memory import exchange, slicing, storage
from sparselong.memory.shape import ModelShape

Device = Literal["cuda", "cpu"]

GIB = 2**30
CONTEXT_BYTES = 806_000_000
"""CUDA context with the kernels loaded (H200, driver 580; smaller GPUs take less)."""
WORKSPACE_BYTES = 122_000_000
"""cuBLAS workspaces of the forward and backward threads (H200, constant from 4,096 to 65,536
tokens)."""
CPU_OVERHEAD_BYTES = GIB
"""Python with torch, transformers and axolotl imported (estimate)."""
LOSS_CHUNK_ROWS = 512
"""Rows whose logits exist at once: CHUNK_ROWS of kernels/layer/cross_entropy.py."""
LOSS_CHUNK_WIDTHS = {"cuda": 1, "cpu": 3}
"""Copies of a chunk's logits: the GPU kernel works in place, torch uses two temporaries."""
SLICE_TOKENS = 16_384
"""Tokens that a checkpointed layer's experts process at once, as in kernels/experts/op.py."""
BUFFER_BYTES = 1 << 28
"""Limit of decoded expert weights: BUFFER_BYTES of kernels/experts/triton_launch.py."""
DECODED_FROM_ROWS = 512
"""Rows per expert above which weights are decoded into that buffer: see kernels.experts."""
GAP_SHARE = 1 / 3
"""Fragmentation between kept attention outputs, as a fraction of their size (H200: 0.1 to 0.6)."""
EXPERT_WIDTHS = 10
"""Live activations of a routed token on a CPU, in intermediate sizes (estimate)."""
EAGER_COPIES = 5
"""Copies of the score matrix in eager attention: scores, sink column, softmax, gradients."""
ADAPTED_WEIGHT_BYTES = 24
"""Bytes per weight of the projection being computed in plain torch (estimate)."""

LAYER, EXPERTS, ATTENTION, LOSS = "layer", "experts_work", "attention_work", "loss"
"""Components that are not all in memory at the same time, as keys of LABELS."""


class Kept(NamedTuple):
    """What checkpointed layers keep for the backward pass instead of recomputing it (GPU only)."""

    attention: bool = False
    """Outputs of full attention."""
    experts: int = 0
    """In how many layers gate_up outputs and routing of the experts, the last ones of the model."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device by component, a key of LABELS, with what layers keep in them."""

    device: Device
    devices: int
    components: dict[str, int]
    kept: Kept = Kept()

    @property
    def at_peak(self) -> dict[str, int]:
        """Components in use when most memory is.

        The loss, a layer's experts and its attention are never in memory together; all other
        components always are.
        """
        layer = {LAYER, max(EXPERTS, ATTENTION, key=self.components.__getitem__)}
        at_work = max({LOSS}, layer, key=lambda names: sum(self.components[n] for n in names))
        absent = {LOSS, LAYER, EXPERTS, ATTENTION} - at_work
        return {name: size for name, size in self.components.items() if name not in absent}

    @property
    def peak_bytes(self) -> int:
        """Largest number of bytes in use at once."""
        return sum(self.at_peak.values())


def finetune_memory(
    shape: ModelShape,
    config: Config,
    device: Device = "cuda",
    *,
    held: storage.Held = storage.WHOLE,
    kept: Kept = Kept(),  # noqa: B008
) -> Memory:
    """Return the memory of stage 03 on each device.

    Args:
        shape: sizes of the base model.
        config: the config of the run; how layers compute is as it says, and under `auto` the
            fastest way, whether it fits or not (see `placing.settle`).
        device: `cuda` computes in bf16, `cpu` in fp32.
        held: how the process holds the experts.
        kept: what layers keep, as far as device and config allow; see `placing.decide_kept`.
    """
    degree, expert_parallel = config.sequence_parallel_degree, held.expert_parallel
    devices = math.lcm(degree, expert_parallel)
    width = 2 if device == "cuda" else 4
    tokens = process_tokens(config)
    nothing = config.nothing_to_keep(device, expert_parallel)
    kept = Kept(
        kept.attention and "keep_attention" not in nothing,
        0 if "keep_experts" in nothing else kept.experts,
    )
    rows = slicing.rows_at_once(config, tokens)
    if expert_parallel > 1:
        experts = _shared_experts(shape, rows or tokens, device, expert_parallel)
    else:
        experts = _experts(shape, config, rows or tokens, device, kept)
    if rows:
        adds_apart = expert_parallel > 1 or device == "cpu"
        experts += slicing.slice_bytes(shape, rows, width, adds_apart)
    components = {
        **weight_bytes(shape, config, width, held),
        "masters": storage.adapted_bytes(shape, config),
        "lora": storage.trained_bytes(shape, config, expert_parallel),
        **_left(shape, config, tokens, width, kept, expert_parallel),
        LAYER: _layer(shape, config, tokens, width, kept),
        EXPERTS: experts,
        ATTENTION: _attention(shape, config, tokens, width, kept),
        LOSS: _loss(shape, config, tokens, device, expert_parallel),
        **_overhead(shape, device, devices),
    }
    return Memory(device, devices, components, kept)


def process_tokens(config: Config) -> int:
    """Return the tokens of a micro-batch that each process computes."""
    return config.micro_batch_size * -(-config.sequence_len // config.sequence_parallel_degree)


def _overhead(shape: ModelShape, device: Device, devices: int) -> dict[str, int]:
    if device == "cpu":
        return {"libraries": CPU_OVERHEAD_BYTES, "decoded": decoded(shape, 4)}
    exchanged = {"nccl": exchange.nccl_bytes(devices)} if devices > 1 else {}
    return {"workspaces": WORKSPACE_BYTES, **exchanged, "context": CONTEXT_BYTES}


def weight_bytes(
    shape: ModelShape, config: Config, width: int, held: storage.Held
) -> dict[str, int]:
    """Return bytes of a process's weights as loaded on its device.

    2:4 experts expand to plain MXFP4, other weights on a CPU to fp32.
    """
    packed, expert_parallel = storage.compressed_groups(shape, config), held.expert_parallel
    unpacked = width // storage.BF16_BYTES  # fp32 copies of weights stored in bf16
    biases = shape.expert_biases * storage.BF16_BYTES
    rows = exchange.device_vocabulary(shape, held, on_cpu=unpacked > 1)
    return {
        **storage.held_experts(shape, held, on_cpu=unpacked > 1),
        "projections": packed["attention"],
        "embedding": rows * shape.hidden * width,
        "small": (packed["small"] - biases + biases // expert_parallel) * unpacked,
    }


def _left(
    shape: ModelShape, config: Config, tokens: int, width: int, kept: Kept, expert_parallel: int
) -> dict[str, int]:
    """Return bytes that the forward pass of all layers leaves for the backward pass."""
    training = config.training
    if not training.gradient_checkpointing:
        saved = 3 * shape.hidden + 2 * shape.query_width + 2 * shape.kv_width
        if expert_parallel == 1:  # shared experts recompute their rows
            saved += shape.experts_per_token * 2 * shape.intermediate
        layer = tokens * saved * width + _scores(shape, config, tokens, width)
        return {"activations": (shape.layers - 1) * layer}
    attention = shape.full_layers * _kept_attention(shape, tokens) if kept.attention else 0
    slices = slicing.rows_at_once(config, tokens)
    gaps = slicing.gap_bytes(shape, tokens, width) if slices else 0
    return {
        "checkpoints": slicing.input_bytes(shape, config, tokens, width),
        "kept_attention": attention,
        "kept_experts": kept.experts * _kept_experts(shape, tokens),
        "gaps": gaps + int(GAP_SHARE * attention),
    }


def _kept_attention(shape: ModelShape, tokens: int) -> int:
    """Return bytes that a layer keeps: attention's output in bf16 and its log-sum-exp in fp32."""
    return tokens * (2 * shape.query_width + 4 * shape.heads)


def _kept_experts(shape: ModelShape, tokens: int) -> int:
    """Return bytes that a layer keeps: gate_up's output in bf16 and each routed token's row."""
    return tokens * shape.experts_per_token * (2 * 2 * shape.intermediate + 4)


def _layer(shape: ModelShape, config: Config, tokens: int, width: int, kept: Kept) -> int:
    """Return bytes saved by the last layer's recomputation, and two gradients of hidden size."""
    # If the last layer has full attention, its kept output is counted in kept_attention.
    is_kept = kept.attention and shape.layers % 2 == 0
    counted = _kept_attention(shape, tokens) if is_kept else 0
    if slicing.rows_at_once(config, tokens):
        return slicing.layer_bytes(shape, tokens, width) - counted
    saved = 5 * shape.hidden + 2 * shape.query_width + 2 * shape.kv_width
    routing = shape.experts_per_token * (8 + 2 * width) + 3 * 4 + shape.head_dim * width
    checkpointed = config.training.gradient_checkpointing
    weights = storage.BF16_BYTES * storage.adapted_weights(shape, config) if checkpointed else 0
    return tokens * (saved * width + 4 * shape.heads + routing) + weights - counted


def _experts(shape: ModelShape, config: Config, tokens: int, device: Device, kept: Kept) -> int:
    """Return the peak bytes of the experts' backward pass."""
    top_k, hidden, inner = shape.experts_per_token, shape.hidden, shape.intermediate
    if device == "cpu":
        return tokens * top_k * EXPERT_WIDTHS * inner * 4
    checkpointed = config.training.gradient_checkpointing
    slices = -(-tokens // SLICE_TOKENS) if checkpointed else 1
    rows = -(-tokens // slices)
    decodes = tokens * top_k > DECODED_FROM_ROWS * shape.experts
    column = rows * top_k * 2  # bytes of one bf16 column of the routed tokens
    gate_up = 2 * inner * column  # a checkpointed layer overwrites it with its gradient
    before, after = _buffer(shape, 2 * inner * hidden), _buffer(shape, inner * hidden)
    moments = [gate_up + (hidden + inner) * column + (after if decodes else 0)]  # dh from dout
    if not checkpointed:
        moments += [2 * gate_up + inner * column]  # d gate_up from dh
        moments += [2 * gate_up + hidden * column + (before if decodes else 0)]  # rows of dx
    if kept.experts:  # in the first slice, while the gate_up outputs of all slices exist
        return max(moments) + rows * top_k * 12 - _kept_experts(shape, rows)
    return max(moments) + rows * top_k * 12


def _shared_experts(shape: ModelShape, tokens: int, device: Device, expert_parallel: int) -> int:
    """Return the peak bytes of the experts' backward pass if processes share them."""
    if device == "cpu":  # decoded weights are a component of their own
        return exchange.backward_bytes(shape, tokens, 4, expert_parallel)
    held = shape.experts // expert_parallel
    decodes = exchange.window_rows(shape, tokens, expert_parallel) > DECODED_FROM_ROWS * held
    before = _buffer(shape, 2 * shape.intermediate * shape.hidden) if decodes else 0
    return exchange.backward_bytes(shape, tokens, 2, expert_parallel) + before


def _buffer(shape: ModelShape, weights: int) -> int:
    """Return bytes of the buffer for decoded bf16 experts, each of `weights` weights."""
    return max(1, min(shape.experts, BUFFER_BYTES // (2 * weights))) * 2 * weights


def _attention(shape: ModelShape, config: Config, tokens: int, width: int, kept: Kept) -> int:
    """Return bytes of attention's backward pass in addition to what the layer has saved.

    They are gradients of out, queries, keys and values and what the backend adds. The second norm's
    output, a gradient of hidden size and the experts' kept outputs are freed before.
    """
    added = _backend_bytes(shape, config, tokens, width)
    if slicing.rows_at_once(config, tokens):
        return slicing.attention_bytes(shape, tokens, width) + added
    freed = _kept_experts(shape, tokens) if kept.experts else 0
    gradients = 2 * shape.query_width + 2 * shape.kv_width - 2 * shape.hidden
    return max(0, tokens * gradients * width + added - freed)


def _backend_bytes(shape: ModelShape, config: Config, tokens: int, width: int) -> int:
    """Return bytes that attention's backend adds to the gradients.

    In FlashAttention-2 they are fp32 sums and per-query-head gradients of keys and values, in our
    Triton kernels nothing, and in eager attention scores.
    """
    if not config.flash_attention:
        return EAGER_COPIES * _scores(shape, config, tokens, width)
    is_ours = config.attention_backend == "triton"
    return 0 if is_ours else tokens * shape.query_width * (4 + 2 * width)


def _scores(shape: ModelShape, config: Config, tokens: int, width: int) -> int:
    """Return bytes of one score matrix of all heads with eager attention, otherwise 0."""
    return 0 if config.flash_attention else tokens * config.sequence_len * shape.heads * width


def _loss(
    shape: ModelShape, config: Config, tokens: int, device: Device, expert_parallel: int
) -> int:
    """Return the peak bytes of the loss, with every token supervised.

    The forward pass holds a chunk's logits, the last layer's output, its norm, its supervised rows
    and their gradient. The backward pass holds the output, and the gradient in bf16, in fp32 and
    scaled. With inputs in host memory, the output is in one of their buffers.
    """
    width, copies = 2 if device == "cuda" else 4, LOSS_CHUNK_WIDTHS[device]
    if expert_parallel > 1:
        chunk = exchange.loss_chunk_bytes(shape, tokens, width, expert_parallel, copies)
    else:
        chunk = min(tokens, LOSS_CHUNK_ROWS) * shape.vocab * width * copies
    rows = tokens * shape.hidden
    output = rows * width if config.training.offload_checkpoints is True else 0
    return max(chunk + 4 * rows * width, rows * (10 if device == "cuda" else 3 * width)) - output


def decoded(shape: ModelShape, width: int) -> int:
    """Return bytes that decoding in plain torch takes.

    They are the larger of one expert's gate_up with temporaries and one adapted projection.
    """
    expert = 3 * 2 * shape.intermediate * shape.hidden * width
    largest = max(rows * columns for rows, columns in shape.projections.values())
    return max(expert, largest * ADAPTED_WEIGHT_BYTES)
