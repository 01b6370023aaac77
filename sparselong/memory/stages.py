"""Working memory of stages 02 and 04, by component.

Stage 02 processes one layer at a time. Stage 04 loads a whole model at a time; if processes share
experts and vocabulary, each loads its share, and works in chunks as in exchange.py. Components are
keys of LABELS. Weights are exact, everything else is an estimate. Both stages compute attention as
stage 03 does: without a score matrix under `flash_attention`, otherwise by transformers' eager
attention.
"""

from __future__ import annotations

from sparselong.config import Config
from sparselong.memory import exchange, storage
from sparselong.memory.shape import ModelShape, drop_experts
from sparselong.memory.training import (
    BUFFER_BYTES,
    CONTEXT_BYTES,
    CPU_OVERHEAD_BYTES,
    EAGER_COPIES,
    EXPERT_WIDTHS,
    LOSS_CHUNK_ROWS,
    LOSS_CHUNK_WIDTHS,
    WORKSPACE_BYTES,
    Device,
    decoded,
)

COMPRESS_BATCH_TOKENS: dict[Device, int] = {"cuda": 16_384, "cpu": 4096}
"""Calibration tokens that stage 02 runs through a layer at once; 120b's experts then have 512 rows
each, at which they reach most of a GPU's rate. Eager attention takes those of a CPU."""
EVALUATED_TOKENS = 1024
"""Length of a conversation, and of a prompt with its answer, in stage 04 that the plan assumes."""
CHAT_TOKENS = 512
"""Length of a prompt of stage 04's chats that the plan assumes."""
PROMPT_TOKENS = 1024
"""Tokens of a prompt that stage 04 reads at once."""
LIVE_WIDTHS = 6
"""Live activations of a token outside the experts, in hidden sizes, if processes share them."""
EVALUATE_BATCH_TOKENS = 16_384
"""Maximum number of tokens that stage 04 runs through a model at once."""


def compress_batch_tokens(config: Config, device: Device) -> int:
    """Return the most calibration tokens of more than one sequence in a pass of stage 02."""
    return COMPRESS_BATCH_TOKENS[device if config.flash_attention else "cpu"]


def compress_memory(shape: ModelShape, config: Config, device: Device) -> dict[str, int]:
    """Return bytes of stage 02 on its device by component.

    They are one layer with a batch of calibration tokens, the next batch's states, and one Hessian,
    its drift, inverse and factors. Refinement, which begins when those are gone and runs no
    experts, takes less on a GPU.
    """
    length = config.calibration.sequence_len
    tokens = max(compress_batch_tokens(config, device), length)
    inputs = max(shape.hidden, shape.query_width)
    states = LIVE_WIDTHS * tokens * shape.hidden * _width(device)
    return {
        "layer_weights": layer_bytes(shape),
        "hessian": 4 * 8 * inputs**2,
        "live": _live(shape, tokens, device, EXPERT_WIDTHS) + states,
        "attention": _attention(shape, config, tokens, length, device),
        **_at_work(shape, device),
    }


def compress_host_memory(shape: ModelShape, config: Config, device: Device) -> dict[str, int]:
    """Return bytes of stage 02 in host memory by component.

    They are the layer being read, the one being written, and the hidden states of the calibration
    tokens before and after a layer.
    """
    return {
        "layer_read": layer_bytes(shape),
        "layer_written": written_bytes(shape, config),
        "hidden_states": 2 * state_bytes(shape, config, device),
    }


def written_bytes(shape: ModelShape, config: Config) -> int:
    """Return bytes of one layer's masters, and of its experts if their form or number changes."""
    written = storage.masters_bytes(shape, config)
    if config.experts.sparsity == "2:4" or config.experts.keep is not None:
        written += storage.compressed_groups(drop_experts(shape, config), config)["experts"]
    return written // shape.layers


def state_bytes(shape: ModelShape, config: Config, device: Device) -> int:
    """Return bytes of the calibration tokens' hidden states between two layers."""
    samples = config.calibration.samples * config.calibration.sequence_len
    return samples * shape.hidden * _width(device)


def temporary_bytes(shape: ModelShape, config: Config, device: Device) -> dict[str, int]:
    """Return bytes of hidden states that stages keep on disk while they work, by artifact.

    Stage 02 has those of the calibration tokens before and after a layer. Stage 04 has the base's
    for each token but the first of the conversations whose divergence is measured, at most
    `sequence_len` tokens each.
    """
    evaluation = config.evaluation
    samples = min(evaluation.divergence_samples, evaluation.perplexity_samples)
    return {
        "compress_work": 2 * state_bytes(shape, config, device),
        "evaluate_work": samples * (config.sequence_len - 1) * shape.hidden * _width(device),
    }


def layer_bytes(shape: ModelShape) -> int:
    """Return bytes of one layer of the base checkpoint."""
    whole = sum(storage.base_groups(shape).values())
    return (whole - 2 * shape.embedding * storage.BF16_BYTES) // shape.layers


def evaluation_memory(
    shape: ModelShape, config: Config, device: Device, held: storage.Held = storage.WHOLE
) -> dict[str, int]:
    """Return bytes of stage 04 on a device by component, for the largest of its models, the base.

    They are those of a batch of conversations, or of an answer after the longest of RULER's
    prompts, whichever are more. With eager attention, conversations longer than EVALUATED_TOKENS
    need more, and so do the prompts of other tasks.

    Args:
        shape: sizes of the base model.
        config: the config of the run.
        device: `cuda` computes in bf16, `cpu` in fp32.
        held: how a process holds the experts.
    """
    width, expert_parallel = _width(device), held.expert_parallel
    base = storage.base_groups(shape)
    rest = base["attention"] + base["small"] - shape.expert_biases * storage.BF16_BYTES
    rest += shape.expert_biases * storage.BF16_BYTES // expert_parallel
    rows = exchange.device_vocabulary(shape, held, on_cpu=device == "cpu")
    rest += rows * shape.hidden * storage.BF16_BYTES
    batch = _batch_memory(shape, config, device, expert_parallel)
    answer = _answer_memory(shape, config, device, expert_parallel)
    exchanged = {}
    if expert_parallel > 1 and device == "cuda":
        exchanged["nccl"] = exchange.nccl_bytes(expert_parallel)
    return {
        **storage.held_experts(shape, held, on_cpu=device == "cpu"),
        "base_rest": rest * (width // storage.BF16_BYTES),
        **max(batch, answer, key=lambda parts: sum(parts.values())),
        **exchanged,
        **_at_work(shape, device),
    }


def _batch_memory(
    shape: ModelShape, config: Config, device: Device, expert_parallel: int
) -> dict[str, int]:
    """Return bytes of a pass over a batch of texts."""
    width = _width(device)
    length = min(config.sequence_len, EVALUATED_TOKENS)
    tokens = min(EVALUATE_BATCH_TOKENS, config.evaluation.batch_size * length)
    if expert_parallel == 1:
        live = _live(shape, tokens, device, 4)
        answers = config.evaluation.batch_size * min(length, 256)
        logits = max(answers * 8, LOSS_CHUNK_ROWS * width * LOSS_CHUNK_WIDTHS[device])
        logits *= shape.vocab
    else:
        live = exchange.forward_bytes(shape, tokens, width, expert_parallel)
        live += LIVE_WIDTHS * tokens * shape.hidden * width
        copies = LOSS_CHUNK_WIDTHS[device]
        logits = exchange.loss_chunk_bytes(shape, tokens, width, expert_parallel, copies)
    attention = _attention(shape, config, tokens, length, device)
    return {"live": live, "attention": attention, "logits": logits, "cache": 0}


def _answer_memory(
    shape: ModelShape, config: Config, device: Device, expert_parallel: int
) -> dict[str, int]:
    """Return bytes of reading a prompt in chunks; each process has the keys of all heads."""
    width, evaluation = _width(device), config.evaluation
    length = max(evaluation.ruler.lengths) if evaluation.ruler_tasks else EVALUATED_TOKENS
    if evaluation.health_prompts:
        length = max(length, CHAT_TOKENS + evaluation.health_tokens)
    slots = shape.full_layers * length
    slots += (shape.layers - shape.full_layers) * min(length, shape.sliding_window)
    tokens = min(length, PROMPT_TOKENS)
    live = _live(shape, tokens, device, 4) + LIVE_WIDTHS * tokens * shape.hidden * width
    if expert_parallel > 1:  # each one's share of the sum, and those of all
        live += (expert_parallel + 1) * tokens * shape.hidden * width
    return {
        "live": live,
        "attention": _attention(shape, config, tokens, length, device),
        "logits": 2 * shape.vocab * 4,
        "cache": slots * 2 * shape.kv_width * width,
    }


def _width(device: Device) -> int:
    return 2 if device == "cuda" else 4


def _live(shape: ModelShape, tokens: int, device: Device, inner_widths: int) -> int:
    """Return bytes of a batch's routed tokens, each taking `inner_widths` intermediate sizes."""
    copies = tokens * shape.experts_per_token
    return copies * inner_widths * shape.intermediate * _width(device)


def _attention(shape: ModelShape, config: Config, tokens: int, length: int, device: Device) -> int:
    """Return bytes of queries, keys, values and output, and of eager attention's score copies."""
    own = tokens * 2 * (shape.query_width + shape.kv_width) * _width(device)
    if config.flash_attention:
        return own
    return own + EAGER_COPIES * shape.heads * tokens * length * _width(device)


def _at_work(shape: ModelShape, device: Device) -> dict[str, int]:
    if device == "cuda":
        return {
            "decoded": BUFFER_BYTES,
            "workspaces": WORKSPACE_BYTES,
            "context": CONTEXT_BYTES,
        }
    return {"decoded": decoded(shape, 4), "libraries": CPU_OVERHEAD_BYTES}
