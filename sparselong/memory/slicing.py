"""Memory of checkpointed layers that compute in slices of rows (model/row_slices.py).

Attention has all tokens of a process (T), everything else those of a slice (S). In hidden (H),
query (Q) and key (K) widths per token, a layer's backward pass holds:

    throughout   T: queries, keys and values (Q + 2 K), attention's output (Q) and its gradient (Q),
                 gradients of the layer's output and input (2 H), the log-sum-exp
    in a slice   S: both results of the second norm, the gradient of the experts' input (3 H), the
                 layer's output if the experts do not add the residual themselves (H), the experts'
                 working memory; o_proj's rounded weight
    attention    T: gradients of queries, keys and values (Q + 2 K), fp32 row sums, and what the
                 backend adds (training.py)

Inputs of all layers are on the device, or in host memory with two buffers on the device, which also
hold the last layer's output. Without slices, but with inputs in host memory, S is T.
"""

from __future__ import annotations

from sparselong.config import Config
from sparselong.memory.shape import ModelShape

AUTO_ROWS = 8192
"""Tokens of a slice under `training.slice_rows: auto`."""
BUFFERS = 2
"""Inputs of layers on the device if the others are in host memory."""


def rows_at_once(config: Config, tokens: int) -> int | None:
    """Return how many of a process's tokens its layers compute at once.

    None: whole layers under torch's checkpoints, or no checkpoints. `auto` counts as not chosen.

    Args:
        config: the config of the run.
        tokens: tokens of the process.
    """
    training = config.training
    if not training.gradient_checkpointing:
        return None
    if isinstance(training.slice_rows, int):
        return min(training.slice_rows, tokens)
    return tokens if training.offload_checkpoints is True else None


def input_bytes(shape: ModelShape, config: Config, tokens: int, width: int) -> int:
    """Return bytes of the layers' inputs on the device."""
    offloads = config.training.offload_checkpoints is True
    return (BUFFERS if offloads else shape.layers) * tokens * shape.hidden * width


def host_input_bytes(shape: ModelShape, config: Config) -> int:
    """Return bytes of a sequence's inputs of all layers in host memory; 0 if they are not there."""
    if config.training.offload_checkpoints is not True:
        return 0
    return shape.layers * config.micro_batch_size * config.sequence_len * shape.hidden * 2


def gap_bytes(shape: ModelShape, tokens: int, width: int) -> int:
    """Return the memory that the allocator cannot reuse, as large as attention's output.

    20b at 131,072 tokens took 1.1 GiB more than its tensors (slices of 8,192, inputs on the host).
    """
    return tokens * shape.query_width * width


def layer_bytes(shape: ModelShape, tokens: int, width: int) -> int:
    """Return bytes that a layer holds throughout its backward pass."""
    widths = 3 * shape.query_width + 2 * shape.kv_width + 2 * shape.hidden
    return tokens * (widths * width + 4 * shape.heads)


def slice_bytes(shape: ModelShape, rows: int, width: int, adds_apart: bool) -> int:
    """Return bytes of a slice's recomputation and backward pass, without its experts' work.

    Args:
        shape: the model's shape.
        rows: tokens of the slice.
        width: bytes of an activation.
        adds_apart: whether the residual is added after the experts' pass and not in it.
    """
    routing = shape.experts_per_token * (8 + 2 * width) + 3 * 4 + shape.head_dim * width
    weight = shape.query_width * shape.hidden * 2
    return rows * ((3 + adds_apart) * shape.hidden * width + routing) + weight


def attention_bytes(shape: ModelShape, tokens: int, width: int) -> int:
    """Return bytes of the gradients that every attention backend makes."""
    widths = shape.query_width + 2 * shape.kv_width
    return tokens * (widths * width + 4 * shape.heads)
