"""One decoding step of a gpt-oss model over a static cache, in kernels or in plain torch.

Both steps have the same contract. `word` (int64 [1]) holds the last token, encoded as in
`kernels/decode/token_word.py`, and `position` (int64 [1]) the position before it. `run()`
increments the position, writes the token's keys and values into the cache, sets `logits` [vocab],
and stores the token with the largest logit in `word`. `KernelStep.run` never synchronizes with the
host, so a CUDA graph can capture it: seven kernels per layer (norm; q, k and v; attention; o with
the residual sum; norm and router; gate_up; down with the weighted and the residual sum), each
packed weight read once. It rounds to bf16 where the model does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import _apply_rotary_emb

from sparselong.kernels import Gate
from sparselong.kernels.decode import decode_token, encode_token
from sparselong.model import PackedExperts, PackedLinear, PartialHead
from sparselong.runtime import current

if TYPE_CHECKING:
    from sparselong.kernels.decode import RouteBuffers


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, [KV heads, slots, head_dim]; position p is in slot p mod slots.

    A sliding layer has one slot per position of its window, so a new key overwrites the one that
    leaves the window.
    """

    keys: torch.Tensor
    values: torch.Tensor
    is_window: bool

    def fill(self, keys: torch.Tensor, values: torch.Tensor, end: int) -> None:
        """Store the last keys and values [KV heads, n, head_dim] of the first `end` tokens."""
        slots = self.keys.shape[1]
        kept = min(keys.shape[1], slots)
        place = torch.arange(end - kept, end, device=keys.device) % slots
        self.keys[:, place], self.values[:, place] = keys[:, -kept:], values[:, -kept:]


def make_caches(model: GptOssForCausalLM, most_tokens: int) -> list[LayerCache]:
    """Return empty caches for `most_tokens` positions, on the model's device, in its dtype."""
    config: Any = model.config
    caches = []
    for kind in config.layer_types:
        is_window = kind == "sliding_attention"
        slots = config.sliding_window if is_window else most_tokens
        shape = (config.num_key_value_heads, slots, config.head_dim)
        keys, values = (
            torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(2)
        )
        caches.append(LayerCache(keys, values, is_window))
    return caches


def make_angles(model: GptOssForCausalLM, most_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the model's rotary cos and sin of every position, [positions, head_dim / 2]."""
    positions = torch.arange(most_tokens, device=model.device)[None]
    sample = torch.empty(0, dtype=model.dtype, device=model.device)
    cos, sin = model.model.rotary_emb(sample, positions)
    return cos[0].contiguous(), sin[0].contiguous()


def compute_logits(model: GptOssForCausalLM, hidden: torch.Tensor) -> torch.Tensor:
    """Return one row's logits [..., vocab]; collective if this process holds a part of lm_head.

    Args:
        model: the model.
        hidden: final hidden state [..., width] of one token.
    """
    head: Any = model.lm_head
    if not isinstance(head, PartialHead):
        return head(hidden)
    exchange: Any = current().vocabulary
    return exchange.logits(hidden, head.weight, head.total)


class TorchStep:
    """Decoding step in plain torch through the model's modules, for CPUs and for shared models."""

    def __init__(self, model: GptOssForCausalLM, caches: list[LayerCache], most_tokens: int):
        self.model, self.caches = model, caches
        self.angles = make_angles(model, most_tokens)
        self.word = torch.full((1,), encode_token(0), dtype=torch.int64, device=model.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=model.device)
        self.logits = torch.empty(0)

    def run(self) -> None:
        """Run one step; see the module docstring."""
        self.position += 1
        token = decode_token(self.word)
        hidden = self.model.model.embed_tokens(token)
        for layer, cache in zip(self.model.model.layers, self.caches, strict=True):
            module: Any = layer
            attended = self._attend(module.self_attn, module.input_layernorm(hidden), cache)
            hidden = hidden + attended
            normed = module.post_attention_layernorm(hidden)
            hidden = hidden + module.mlp(normed[None])[0][0]
        self.logits = compute_logits(self.model, self.model.model.norm(hidden))[0]
        best = int(self.logits.argmax())
        self.word.fill_(encode_token(best, is_finite=bool(self.logits.isfinite().all())))

    def _attend(self, attention: Any, x: torch.Tensor, cache: LayerCache) -> torch.Tensor:
        position = int(self.position)
        slots = cache.keys.shape[1]
        seen = min(position + 1, slots)
        q, k, v = (
            projection(x).view(-1, attention.head_dim)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        cos, sin = (angle[position] for angle in self.angles)
        cache.keys[:, position % slots] = _apply_rotary_emb(k, cos, sin)
        cache.values[:, position % slots] = v
        keys, values = cache.keys[:, :seen], cache.values[:, :seen]
        q = _apply_rotary_emb(q, cos, sin).view(len(keys), -1, attention.head_dim)
        scores = q.float() @ keys.float().transpose(1, 2) * attention.scaling
        scores = torch.cat([scores, attention.sinks.float().view(len(keys), -1, 1)], -1)
        attended = scores.softmax(-1)[..., :-1] @ values.float()
        return attention.o_proj(attended.to(x.dtype).view(1, -1))


class KernelStep:
    """Decoding step in Triton kernels, without host synchronization; see the module docstring.

    Raises:
        ValueError: The kernels do not support a module (experts other than PackedExperts,
            projections not packed in 4 bits, adapters), or a KV head has more than 16 query heads.
    """

    def __init__(self, model: GptOssForCausalLM, caches: list[LayerCache], most_tokens: int):
        self.caches = caches
        self.angles = make_angles(model, most_tokens)
        self.model = model.model
        self.head = model.lm_head.weight
        config: Any = model.config
        device, dtype, width = model.device, model.dtype, config.hidden_size
        empty = {"device": device, "dtype": dtype}
        heads, kv_heads, dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        _check_group(heads, kv_heads)
        self.word = torch.full((1,), encode_token(0), dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.logits = torch.empty(config.vocab_size, **empty)
        self.hidden = torch.empty(width, **empty)
        self.normed = torch.empty(width, **empty)
        self.qkv = torch.empty((1, (heads + 2 * kv_heads) * dim), **empty)
        self.attended = torch.empty(heads * dim, **empty)
        self.scratch = _attention_scratch(heads, kv_heads, dim, device)
        self.route = _route_buffers(config, dtype, device)
        self.h = torch.empty(
            (config.num_experts_per_tok, config.intermediate_size // 2),
            dtype=torch.int32,
            device=device,
        )
        self.pdl = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
        self.layers = [_Layer(layer) for layer in model.model.layers]

    def run(self) -> None:
        """Run one step; see the module docstring."""
        from sparselong.kernels.decode import launch_embed, launch_head, launch_pack

        # The first launch follows no kernel of ours, so it has nothing to overlap with. The second
        # must not overlap with the first: attention reads the position before its wait.
        launch_embed(self.word, self.position, self.model.embed_tokens.weight, self.hidden)
        for number, (layer, cache) in enumerate(zip(self.layers, self.caches, strict=True)):
            self._attend(layer, cache, self.pdl and number > 0)
            self._run_mlp(layer)
        norm = (self.model.norm.weight, self.model.norm.variance_epsilon)
        blocks = self.hidden.numel() // 32
        launch_pack(self.hidden, norm, self.normed, self.normed, "plain", blocks, self.pdl)
        launch_head(self.normed, self.head, None, self.logits, best=self.word, pdl=self.pdl)

    def _attend(self, layer: _Layer, cache: LayerCache, pdl: bool) -> None:
        """Run norm, projections, attention and residual sum; `pdl` is for the first kernel."""
        from sparselong.kernels.decode import (
            LayerAttention,
            launch_attend,
            launch_gemv,
            launch_head,
            launch_pack,
        )

        blocks = self.hidden.numel() // 32
        kind = "pairs" if layer.is_packed else "plain"
        out: Any = self.normed.view(torch.int16) if layer.is_packed else self.normed
        launch_pack(self.hidden, layer.input_norm, out, self.route.factors, kind, blocks, pdl)
        if layer.is_packed:
            planes = self.normed.view(torch.int32).view(1, 16, -1)
            launch_gemv(planes, layer.qkv, self.qkv, pdl=self.pdl)
        else:
            start = 0
            for weight, bias in layer.qkv:
                part = self.qkv[0, start : start + len(weight)]
                launch_head(self.normed, weight, bias, part, pdl=self.pdl)
                start += len(weight)
        launch_attend(
            self.qkv, self.angles, (cache.keys, cache.values),
            LayerAttention(layer.sinks, layer.scaling, cache.is_window), self.scratch,
            self.attended, self.position, pairs=layer.is_packed, pdl=self.pdl,
        )  # fmt: skip
        if layer.is_packed:
            planes = self.attended.view(torch.int32).view(1, 16, -1)
            launch_gemv(planes, layer.o, self.hidden, residual=self.hidden, pdl=self.pdl)
        else:
            weight, bias = layer.o[0]
            launch_head(
                self.attended, weight, bias, self.hidden, residual=self.hidden, pdl=self.pdl
            )

    def _run_mlp(self, layer: _Layer) -> None:
        """Run norm, router, experts and residual sum."""
        from sparselong.kernels.decode import launch_experts, launch_route

        route = self.route
        launch_route(self.hidden, layer.post_norm, *layer.router, route, pdl=self.pdl)
        launch_experts(
            (route.planes, route.factors), route.indices, route.weights, layer.stack, layer.gate,
            self.hidden[None], residual=self.hidden[None], h=self.h, pdl=self.pdl,
        )  # fmt: skip


def _check_group(heads: int, kv_heads: int) -> None:
    from sparselong.kernels.decode import QUERIES

    if heads > QUERIES * kv_heads:  # the kernel would leave the output of further heads unset
        raise ValueError(
            f"num_attention_heads: {heads} of {kv_heads} KV heads; allowed: at most {QUERIES} per "
            "KV head. Use model.generate(...) instead"
        )


def _attention_scratch(
    heads: int, kv_heads: int, dim: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from sparselong.kernels.decode import FULL_PARTS

    return (
        torch.empty((FULL_PARTS, heads, dim), dtype=torch.float32, device=device),
        torch.empty((FULL_PARTS, heads), dtype=torch.float32, device=device),
        torch.zeros(kv_heads, dtype=torch.int32, device=device),
    )


def _route_buffers(config: Any, dtype: torch.dtype, device: torch.device) -> RouteBuffers:
    from sparselong.kernels.decode import RouteBuffers

    width, top_k = config.hidden_size, config.num_experts_per_tok
    return RouteBuffers(
        planes=torch.empty((1, 4, width // 8), dtype=torch.int32, device=device),
        factors=torch.empty(width // 32, dtype=torch.float32, device=device),
        logits=torch.empty(config.num_local_experts, dtype=torch.float32, device=device),
        counter=torch.zeros(1, dtype=torch.int32, device=device),
        indices=torch.zeros((1, top_k), dtype=torch.int32, device=device),
        weights=torch.empty((1, top_k), dtype=dtype, device=device),
    )


class _Layer:
    """One layer's weights in the form that the kernels take: views, no copies."""

    def __init__(self, layer: Any):
        attention, experts = layer.self_attn, layer.mlp.experts
        if type(experts) is not PackedExperts:
            raise ValueError(
                f"experts: {type(experts).__name__}; allowed: PackedExperts. "
                "Use model.generate(...) instead"
            )
        projections = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        kinds = {type(projection) for projection in projections}
        if kinds not in ({PackedLinear}, {nn.Linear}):
            raise ValueError(
                f"projections: {', '.join(sorted(kind.__name__ for kind in kinds))}; allowed: all "
                "PackedLinear or all Linear. Use model.generate(...) instead"
            )
        self.is_packed = kinds == {PackedLinear}
        matrices: Any = tuple(_read(projection) for projection in projections)
        self.qkv, self.o = matrices[:3], matrices[3:]
        self.sinks, self.scaling = attention.sinks, attention.scaling
        self.input_norm, self.post_norm = (
            (norm.weight, norm.variance_epsilon)
            for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        )
        self.router = (layer.mlp.router.weight, layer.mlp.router.bias)
        self.stack, self.gate = experts.stack().in_place(), Gate(experts.alpha, experts.limit)


def _read(projection: Any) -> Any:
    if isinstance(projection, nn.Linear):
        return projection.weight, projection.bias
    from sparselong.kernels.decode import as_matrix

    return as_matrix(projection.fmt, projection.packed(), projection.bias)
