"""Perplexity of the small model on held-out text, and how much of it depends on attention.

If the model ignored attention, damage to attention would not show. `measure` therefore reports, in
addition to the perplexity of the model and of a unigram model of the same text, the perplexity with
every attention output set to zero and with q, k, v and o under a random 2:4 mask.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Mxfp4Config, PreTrainedModel

from sparselong.data import corpus

_SEQUENCE_TOKENS = 256
_SEQUENCES_AT_ONCE = 8


def measure(checkpoint_dir: Path, held_out_tokens: int = 32_768) -> dict[str, float]:
    """Return perplexities per token on the beginning of the held-out documents.

    Args:
        checkpoint_dir: a checkpoint in openai/gpt-oss's format, small enough to dequantize.
        held_out_tokens: number of tokens to read, in sequences of 256.

    Returns:
        `perplexity`, `unigram_perplexity` (counts of the training text plus one),
        `perplexity_without_attention`, `perplexity_random_two_four`, `held_out_tokens`.
    """
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_dir)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint_dir,
        quantization_config=Mxfp4Config(dequantize=True),
        dtype=torch.bfloat16,
        attn_implementation="eager",
    ).float()
    held_out = _encode(tokenizer, corpus.texts("held_out"))[:held_out_tokens]
    sequences = held_out[: len(held_out) // _SEQUENCE_TOKENS * _SEQUENCE_TOKENS]
    sequences = sequences.view(-1, _SEQUENCE_TOKENS)
    figures = {"perplexity": perplexity(model, sequences)}
    with no_attention(model):
        figures["perplexity_without_attention"] = perplexity(model, sequences)
    mask_attention_at_random(model)
    figures["perplexity_random_two_four"] = perplexity(model, sequences)
    counts = torch.bincount(_encode(tokenizer, corpus.texts("train")), minlength=len(tokenizer))
    log_shares = ((counts + 1) / (counts + 1).sum()).log()
    figures["unigram_perplexity"] = math.exp(-log_shares[sequences[:, 1:]].mean().item())
    return {**figures, "held_out_tokens": sequences.numel()}


@torch.no_grad()
def perplexity(model: PreTrainedModel, sequences: torch.Tensor) -> float:
    """Return the perplexity of sequences, int64 [N, T], without each sequence's first token."""
    losses = [
        model(input_ids=batch, labels=batch, use_cache=False).loss.double() * len(batch)
        for batch in sequences.split(_SEQUENCES_AT_ONCE)
    ]
    return math.exp((torch.stack(losses).sum() / len(sequences)).item())


def _encode(tokenizer, texts: list[str]) -> torch.Tensor:
    encoded = tokenizer([f"{text}<|endoftext|>" for text in texts], add_special_tokens=False)
    return torch.tensor([token for ids in encoded["input_ids"] for token in ids])


@contextmanager
def no_attention(model: PreTrainedModel) -> Iterator[None]:
    """Replace every layer's attention output by zeros inside the block."""

    def replace_output(module, arguments, output):
        return torch.zeros_like(output[0]), *output[1:]

    hooks = [layer.self_attn.register_forward_hook(replace_output) for layer in model.model.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def mask_attention_at_random(model: PreTrainedModel) -> None:
    """Keep two random weights of every four consecutive inputs of q, k, v and o, in place."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weight = getattr(layer.self_attn, name).weight
            draw = torch.rand(weight.numel() // 4, 4, generator=generator)
            keep = torch.zeros_like(draw).scatter_(1, draw.topk(2, dim=1).indices, 1.0)
            weight.mul_(keep.view_as(weight).to(weight.device))
