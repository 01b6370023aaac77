"""What sharing experts and vocabulary costs a process: working memory, and bytes exchanged.

The processes of an expert group hold its experts and vocabulary rows in equal shares. A layer's
hidden states are processed in chunks of rows from each process, so that the exchange of one chunk
overlaps the computation of another. While a chunk is computed, a process holds its gathered rows
and those of the next chunk, its experts' partial outputs, and the outputs of the chunk before, both
those that it sends and those that it receives; in the backward pass also the gradients of both
chunks' outputs. Without a backward pass partial outputs are exact, in fp64. The rows that a
process's experts compute are sorted by expert and pass through in windows of at most WINDOW_ROWS:
imbalance makes more windows, not larger ones. The loss gathers LOSS_ROWS rows of each process at a
time and computes their logits against the process's own rows of the vocabulary.
"""

from __future__ import annotations

from sparselong.memory.shape import ModelShape
from sparselong.memory.storage import Held, embedding_host_bytes

INFERENCE_ROWS, TRAINED_ROWS = 8_192, 4_096
"""Most rows that are exchanged at once, as in parallel/experts/pipeline.py: without a backward pass
of all processes, in one of each process."""
EXACT_BYTES = 8
"""Bytes of a value of exact partial outputs."""
WINDOW_ROWS = 18_432
"""Most routed rows that pass through a process's experts at once: WINDOW_ROWS of
kernels/experts/held.py."""
LOSS_ROWS = 512
"""Rows of each process whose logits exist at once: CHUNK_ROWS of kernels/layer/cross_entropy.py."""
NCCL_BYTES, NCCL_PEER_BYTES = int(0.7 * 2**30), int(0.1 * 2**30)
"""What NCCL takes on a GPU, and more of it for each other process: 0.80 GiB on two H200 and 0.98 on
four with peer access, 0.40 and 0.59 without. On four H100 that could multicast it took 2.16."""
ROUTING_BYTES = 12
"""Bytes of a routed token's expert and weight, and of its place in the sorted order."""
EXCHANGES = 5
"""Exchanges of a layer's hidden states in a step: forward, the inputs and the outputs; backward,
the inputs again, the gradients of the outputs and those of the inputs."""


def vocabulary_rows(shape: ModelShape, expert_parallel: int) -> int:
    """Return the most rows of embedding, or of lm_head, that a process holds."""
    return -(-shape.vocab // expert_parallel)


def window_rows(shape: ModelShape, tokens: int, expert_parallel: int) -> int:
    """Return the rows that pass through a process's experts at once."""
    chunk = min(TRAINED_ROWS, tokens)
    return min(expert_parallel * chunk * shape.experts_per_token, WINDOW_ROWS)


def nccl_bytes(processes: int) -> int:
    """Return what NCCL's communicators take on a GPU with this many processes on the machine."""
    return NCCL_BYTES + (processes - 1) * NCCL_PEER_BYTES


def forward_bytes(shape: ModelShape, tokens: int, width: int, expert_parallel: int) -> int:
    """Return the peak bytes of a layer in a pass without gradients, without decoded weights.

    Args:
        shape: sizes of the base model.
        tokens: rows of each process.
        width: bytes of an activation.
        expert_parallel: number of processes in an expert group.
    """
    window = window_rows(shape, tokens, expert_parallel)
    rows = 2 * shape.hidden + 3 * shape.intermediate  # inputs and outputs; gate_up's output, h
    chunks = -(-tokens * expert_parallel // INFERENCE_ROWS)
    # Its gathered rows, and the next chunk's; its shares, and those sent and received before.
    gathered, shares = (2 if chunks > 2 else 1), (1 if chunks == 1 else 3)
    exchanged = -(-tokens // chunks) * expert_parallel * shape.hidden
    exchanged *= gathered * width + shares * EXACT_BYTES
    return window * rows * width + exchanged + _routing_bytes(shape, tokens, expert_parallel)


def backward_bytes(shape: ModelShape, tokens: int, width: int, expert_parallel: int) -> int:
    """Return the peak bytes of a layer's backward pass, without decoded weights.

    gate_up's output is recomputed and overwritten by its gradient. Arguments: see `forward_bytes`.
    """
    window = window_rows(shape, tokens, expert_parallel)
    rows = 2 * shape.hidden + 3 * shape.intermediate  # gradients of outputs and inputs; gate_up, dh
    chunks = -(-tokens // TRAINED_ROWS)
    # Chunks of rows held in a middle one; the last of two is not joined by a next one.
    held = {1: 3, 2: 5}.get(chunks, 7) * -(-tokens // chunks)
    exchanged = held * expert_parallel * shape.hidden * width
    return window * rows * width + exchanged + _routing_bytes(shape, tokens, expert_parallel)


def _routing_bytes(shape: ModelShape, tokens: int, expert_parallel: int) -> int:
    """Return bytes of all processes' routing."""
    return expert_parallel * tokens * shape.experts_per_token * ROUTING_BYTES


def loss_chunk_bytes(
    shape: ModelShape, tokens: int, width: int, expert_parallel: int, copies: int
) -> int:
    """Return bytes of the loss's current chunk.

    They are the logits of the process's own vocabulary rows (`copies` times), the gathered rows,
    the partial gradients of these rows, and the parts that come home.
    """
    rows = expert_parallel * min(LOSS_ROWS, tokens)
    logits = rows * vocabulary_rows(shape, expert_parallel) * width * copies
    return logits + 3 * rows * shape.hidden * width


def device_vocabulary(shape: ModelShape, held: Held, on_cpu: bool) -> int:
    """Return the rows of embedding and lm_head together that a process holds on its device.

    Beside experts in host memory, an embedding that is not shared is there too.
    """
    rows = vocabulary_rows(shape, held.expert_parallel)
    return rows if embedding_host_bytes(shape, held) and not on_cpu else 2 * rows


def sent_bytes(shape: ModelShape, expert_parallel: int) -> int:
    """Return bytes that a process sends for each of its tokens in a step of training, in bf16.

    That is to each of the other processes, in every layer and exchange.
    """
    return shape.layers * EXCHANGES * (expert_parallel - 1) * shape.hidden * 2
