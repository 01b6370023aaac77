"""A prompt's keys and values straight into a decoder's static cache, as transformers' Cache.

transformers' DynamicCache would hold them a second time until the cache is filled from it: in every
layer the keys of all tokens, in sliding layers too, whose window is a view of them. Here a full
layer's keys go to their places and are read there; a sliding layer's go into its ring, and what the
next chunk of the prompt needs of them comes out of the ring in order.

Left out: batches, and everything that edits a cache (beams, cropping, offloading).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from sparselong.generation.step import LayerCache


class FullPromptLayer(DynamicLayer):
    """A layer in which every token sees all before it."""

    def __init__(self, cache: LayerCache):
        super().__init__()
        self.cache, self.end = cache, 0

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.end

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes a chunk's keys and values [1, KV heads, tokens, head_dim]; all so far."""
        begin, self.end = self.end, self.end + key_states.shape[2]
        self.cache.keys[:, begin : self.end] = key_states[0]
        self.cache.values[:, begin : self.end] = value_states[0]
        if begin == 0:
            return key_states, value_states
        return self.cache.keys[None, :, : self.end], self.cache.values[None, :, : self.end]


class WindowPromptLayer(DynamicSlidingWindowLayer):
    """A layer in which a token sees as many tokens as its cache has slots, itself included."""

    def __init__(self, cache: LayerCache):
        super().__init__(sliding_window=cache.keys.shape[1])
        self.cache = cache

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes a chunk's keys and values [1, KV heads, tokens, head_dim]; theirs and those before
        them that the chunk's first token sees."""
        begin, slots = self.cumulative_length, self.sliding_window
        self.cumulative_length += key_states.shape[2]
        keys, values = key_states, value_states
        if begin:
            place = torch.arange(max(0, begin - slots + 1), begin, device=keys.device) % slots
            keys = torch.cat([self.cache.keys[None, :, place], keys], 2)
            values = torch.cat([self.cache.values[None, :, place], values], 2)
        self.cache.fill(key_states[0], value_states[0], self.cumulative_length)
        return keys, values


def make_prompt_cache(caches: list[LayerCache]) -> Cache:
    """A Cache for one prompt's pass, in chunks or whole, that leaves `caches` filled."""
    layers: list[Any] = [
        WindowPromptLayer(cache) if cache.is_window else FullPromptLayer(cache) for cache in caches
    ]
    return Cache(layers=layers)
