"""transformers Cache that writes a prompt's keys and values directly into the static cache.

transformers' DynamicCache would hold a second copy until the static cache is filled from it: the
keys of all tokens in every layer, sliding layers included, whose window is a view of them. Here a
full layer's keys are written in place and read from there. A sliding layer's keys go into its ring
buffer, from which the next prompt chunk gathers the ones it needs in order.

Not supported: batches, and everything that edits a cache (beams, cropping, offloading).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from sparselong.generation.step import LayerCache


class FullPromptLayer(DynamicLayer):
    """Full-attention layer: every token attends to all earlier tokens."""

    def __init__(self, cache: LayerCache, end: int):
        super().__init__()
        self.cache, self.end = cache, end

    def get_seq_length(self) -> int:
        """Return the number of cached tokens."""
        return self.end

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a chunk's keys and values [1, KV heads, tokens, head_dim]; return all cached."""
        begin, self.end = self.end, self.end + key_states.shape[2]
        self.cache.keys[:, begin : self.end] = key_states[0]
        self.cache.values[:, begin : self.end] = value_states[0]
        if begin == 0:
            return key_states, value_states
        return self.cache.keys[None, :, : self.end], self.cache.values[None, :, : self.end]


class WindowPromptLayer(DynamicSlidingWindowLayer):
    """Sliding-window layer: a token attends to as many tokens as there are slots, with itself."""

    def __init__(self, cache: LayerCache, end: int):
        super().__init__(sliding_window=cache.keys.shape[1])
        self.cache, self.cumulative_length = cache, end

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a chunk's keys and values [1, KV heads, tokens, head_dim].

        Returns:
            The chunk's keys and values, preceded by those in the window of its first token.
        """
        begin, slots = self.cumulative_length, self.sliding_window
        self.cumulative_length += key_states.shape[2]
        keys, values = key_states, value_states
        if begin:
            place = torch.arange(max(0, begin - slots + 1), begin, device=keys.device) % slots
            keys = torch.cat([self.cache.keys[None, :, place], keys], 2)
            values = torch.cat([self.cache.values[None, :, place], values], 2)
        self.cache.fill(key_states[0], value_states[0], self.cumulative_length)
        return keys, values


def make_prompt_cache(caches: list[LayerCache], begin: int = 0) -> Cache:
    """Return a Cache that fills `caches` as one prompt is prefilled, whole or in chunks.

    Args:
        caches: written to; they hold the prompt's first `begin` tokens.
        begin: position of the first token that will be prefilled.
    """
    layers: list[Any] = [
        (WindowPromptLayer if cache.is_window else FullPromptLayer)(cache, begin)
        for cache in caches
    ]
    return Cache(layers=layers)
