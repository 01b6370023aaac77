"""A small unpacked gpt-oss whose tokens change if one key is wrong."""

import copy
from typing import Any

import torch
from transformers import GptOssForCausalLM

from tests.generation.test_decoder import CONFIG

SMALL = copy.deepcopy(CONFIG)
VOCAB = CONFIG.vocab_size


def make_small() -> GptOssForCausalLM:
    """Return a random fp32 model with windows of 8 tokens."""
    torch.manual_seed(1)
    model = GptOssForCausalLM._from_config(SMALL, dtype=torch.float32, attn_implementation="eager")
    for name, tensor in model.named_parameters():
        if "norm" not in name:
            tensor.data.normal_(0.0, 0.3)
    return model.requires_grad_(False).eval()


def draw_tokens(count: int, seed: int) -> list[int]:
    """Return random tokens."""
    source = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (count,), generator=source).tolist()


def as_prompt(tokens: list[int]) -> torch.Tensor:
    """Return tokens as a prompt [1, tokens]."""
    return torch.tensor([tokens])


def state_of(decoder: Any) -> list[torch.Tensor]:
    """Return the keys and values that the next token may attend to, in order of position."""
    end = len(decoder.history.tokens)
    state = []
    for cache in decoder.caches:
        slots = cache.keys.shape[1]
        place = torch.arange(max(0, end - slots + 1), end) % slots
        state += [cache.keys[:, place].clone(), cache.values[:, place].clone()]
    return state
