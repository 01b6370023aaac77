"""Backends and inputs in gpt-oss's shape for benchmarks/attention.py."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sparselong.kernels.attention.flash_attn_4 import ARCHITECTURE
from sparselong.kernels.attention.installed import refuse_flash_attn, refuse_flash_attn_4
from sparselong.kernels.attention.op import attention
from sparselong.kernels.gpu import architecture_of

HEADS, KV_HEADS, HEAD_DIM, WINDOW = 64, 8, 64, 128
MEAN_DOCUMENT = 1024
OURS = ("triton", "torch_flash", "torch_cudnn", "flash_attn", "flash_attn_4")
Run = Callable[..., torch.Tensor]


def eager(q, k, v, sinks, window=None, cu_seqlens=None) -> torch.Tensor:
    """Compute attention as transformers' eager gpt-oss does, in the inputs' dtype."""
    tokens, group = q.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    at = torch.arange(tokens, device=q.device)
    seen = at <= at[:, None]
    if window is not None:
        seen &= at > at[:, None] - window
    scores = scores.masked_fill(~seen, torch.finfo(q.dtype).min)
    logits = torch.cat([scores, sinks.to(q.dtype).view(1, -1, 1, 1).expand(*q.shape[:3], 1)], -1)
    logits = logits - logits.max(-1, keepdim=True).values
    return torch.softmax(logits, -1, dtype=logits.dtype)[..., :-1] @ v


def make_flex() -> Run:
    """Return torch's flex_attention compiled with the sinks, applied through its log-sum-exp."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def attend(q, k, v, sinks, mask):
        out, lse = flex_attention(q, k, v, block_mask=mask, enable_gqa=True, return_lse=True)
        return (out * torch.sigmoid(lse - sinks[:, None])[..., None]).to(q.dtype)

    compiled = torch.compile(attend, dynamic=False)
    masks = {}

    def run(q, k, v, sinks, window=None, cu_seqlens=None) -> torch.Tensor:
        tokens = q.shape[2]
        if (tokens, window) not in masks:

            def seen(batch, head, query, key):
                causal = query >= key
                return causal if window is None else causal & (query - key < window)

            masks[tokens, window] = create_block_mask(seen, None, None, tokens, tokens, q.device)
        return compiled(q, k, v, sinks, masks[tokens, window])

    return run


def make_runs(names: list[str]) -> dict[str, Run]:
    """Return the named backends as functions (q, k, v, sinks, window, cu_seqlens) → out."""

    def ours(name: str | None) -> Run:
        return lambda q, k, v, sinks, window=None, cu_seqlens=None: attention(
            q, k, v, sinks, window=window, cu_seqlens=cu_seqlens, backend=name
        )[0]

    known = {name: ours(name) for name in OURS} | {"chosen": ours(None), "eager": eager}
    if "flex" in names:
        known["flex"] = make_flex()
    return {name: known[name] for name in names}


def kind_of(window: int | None) -> str:
    """Return the name of a layer's kind."""
    return "full" if window is None else "window"


def skips(name: str, window: int | None, packed: bool, tokens: int) -> bool:
    """Return whether a backend cannot run a case, because of its features or its memory."""
    if name == "torch_cudnn":
        return window is not None or packed
    if name == "eager":
        return packed or tokens > 8192
    if name == "flex":
        return packed or tokens > 16384  # compiles for every length
    return refuse(name) is not None


def refuse(name: str) -> str | None:
    """Return why a backend runs no case on this machine, or None."""
    if name == "flash_attn":
        return refuse_flash_attn()
    if name == "flash_attn_4":
        found = architecture_of(torch.device("cuda", 0))
        if found != ARCHITECTURE:
            return f"device: {found}; allowed: {ARCHITECTURE}"
        return refuse_flash_attn_4()
    return None


def draw(tokens: int) -> list[torch.Tensor]:
    """Return q, k, v and sinks, which require gradients, and dout, laid out as in the model."""
    torch.manual_seed(tokens)

    def tensor(heads: int) -> torch.Tensor:
        drawn = torch.randn(1, tokens, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        return drawn.transpose(1, 2)

    leaves = [tensor(HEADS), tensor(KV_HEADS), tensor(KV_HEADS), torch.randn(HEADS, device="cuda")]
    return [t.requires_grad_() for t in leaves] + [tensor(HEADS)]


def pack(tokens: int) -> torch.Tensor:
    """Return cu_seqlens of documents with uniformly distributed lengths around MEAN_DOCUMENT."""
    generator = torch.Generator().manual_seed(0)
    bounds = [0]
    while bounds[-1] < tokens:
        length = int(torch.randint(1, 2 * MEAN_DOCUMENT, (), generator=generator))
        bounds.append(min(tokens, bounds[-1] + length))
    return torch.tensor(bounds, dtype=torch.int32, device="cuda")


def count_pairs(tokens: int, window: int | None, cu_seqlens: torch.Tensor | None) -> int:
    """Return the number of (query, key) pairs per head that the mask leaves."""
    bounds = [0, tokens] if cu_seqlens is None else cu_seqlens.tolist()
    total = 0
    for start, end in zip(bounds, bounds[1:], strict=False):
        length, reach = end - start, min(window or end, end - start)
        total += reach * (reach + 1) // 2 + (length - reach) * reach
    return total


def count_bytes(tokens: int, backward: bool) -> int:
    """Return bytes that must move: q, k, v, out; in backward also these, dout, dq, dk and dv."""
    q, kv = tokens * HEADS * HEAD_DIM * 2, tokens * KV_HEADS * HEAD_DIM * 2
    forward = 2 * q + 2 * kv
    return forward + (4 * q + 4 * kv if backward else 0)
