"""Attention with sinks in plain torch: the CPU backend.

It follows the definition: scores, mask, one more logit per head, softmax, and the product with the
values without the sink's share. Gradients are torch's own. It shares no code with the kernels.

Queries are taken in chunks of `rows`. With gradients, each chunk is recomputed in the backward
pass, so memory grows with rows * keys instead of queries * keys. Arithmetic is in fp32 (fp64 for
fp64 inputs) whatever the inputs' dtype, because nothing is faster on a CPU.
"""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from sparselong.kernels.attention.mask import Attended, AttentionCall, Gradients, SavedForward


def attention_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor,
    *,
    document: torch.Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    query_offset: int = 0,
    rows: int = 256,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out like q, natural-log lse [batch, heads, queries] with the sink included).

    Args:
        q: [batch, heads, queries, head_dim]. Query i has position `query_offset + i`.
        k: [batch, kv_heads, keys, head_dim]; head h reads KV head h // (heads / kv_heads).
        v: shaped like k.
        sinks: [heads], one more logit in each head's softmax, without a value.
        document: integers [batch, keys]; a query sees only keys with its own position's integer.
        window: most keys that a query sees, its own position included.
        scale: factor of the scores, 1 / sqrt(head_dim) if None.
        query_offset: position of query 0 on the key axis.
        rows: queries per chunk.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outs, lses = [], []
    for first in range(0, q.shape[2], rows):
        last = min(first + rows, q.shape[2])
        positions = torch.arange(first, last, device=q.device) + query_offset
        end = min(k.shape[2], query_offset + last)
        begin = 0 if window is None else min(end, max(0, query_offset + first - window + 1))
        seen = _find_seen(positions, begin, end, window, document).expand(q.shape[0], -1, -1)
        out, lse = checkpoint(
            _attend_chunk,
            q[:, :, first:last],
            k[:, :, begin:end],
            v[:, :, begin:end],
            sinks,
            seen,
            scale,
            use_reentrant=False,
            preserve_rng_state=False,
        )  # pyright: ignore[reportGeneralTypeIssues]
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _find_seen(
    positions: torch.Tensor,
    begin: int,
    end: int,
    window: int | None,
    document: torch.Tensor | None,
) -> torch.Tensor:
    """Return bool [1 or batch, queries, keys]: which of the keys from `begin` to `end` are seen."""
    keys = torch.arange(begin, end, device=positions.device)
    seen = keys <= positions[:, None]
    if window is not None:
        seen = seen & (keys > positions[:, None] - window)
    if document is None:
        return seen[None]
    return seen & (document[:, positions, None] == document[:, None, begin:end])


def _attend_chunk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor,
    seen: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, queries, head_dim = q.shape
    grouped = q.to(dtype).view(batch, k.shape[1], -1, queries, head_dim)
    with torch.autocast(q.device.type, enabled=False):  # keep products out of bf16
        scores = torch.einsum("bhgqd,bhkd->bhgqk", grouped, k.to(dtype)) * scale
        scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
        sink = sinks.to(dtype).view(1, k.shape[1], -1, 1, 1).expand(batch, -1, -1, queries, 1)
        lse = torch.cat([scores, sink], -1).logsumexp(-1, keepdim=True)
        out = torch.einsum("bhgqk,bhkd->bhgqd", torch.exp(scores - lse), v.to(dtype))
    return out.reshape(q.shape).to(q.dtype), lse.reshape(batch, heads, queries)


@torch.no_grad()
def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor, call: AttentionCall
) -> Attended:
    """Run only the forward pass, for callers that have their own autograd function."""
    return *attend_call(q, k, v, sinks, call), ()


def attend_backward(dout: torch.Tensor, saved: SavedForward, call: AttentionCall) -> Gradients:
    """Return the gradients of `attend`, recomputing the forward pass."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in saved[:4]]
        out, _ = attend_call(*leaves, call)  # pyright: ignore[reportCallIssue]
        dq, dk, dv, dsinks = torch.autograd.grad(out, leaves, dout)
    return dq, dk, dv, dsinks if call.needs_dsinks else None


def attend_call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor, call: AttentionCall
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `attention_torch` of a call; torch's own autograd differentiates it."""
    mask = call.mask
    return attention_torch(
        *(q, k, v, sinks),
        document=None if mask.documents is None else mask.documents.starts,
        window=mask.window,
        scale=call.scale,
        query_offset=mask.offset,
    )
