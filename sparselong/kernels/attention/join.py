"""Adds sinks to plain attention, and combines attention over two sets of keys.

With plain attention's outputs o and natural-log lse over one or two sets of keys, and a head's sink
s,

    lse' = log(exp(lse1) + exp(lse2) + exp(s))
    out  = o1 exp(lse1 - lse') + o2 exp(lse2 - lse')

is exactly attention with the sink over all keys. Plain torch needs a dozen passes over memory and
an fp32 copy of out; on a GPU one Triton kernel reads the outputs and overwrites the first. The sums
are taken in fp32 and rounded once. Source: online softmax (Milakov and Gimelshein, 2018).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparselong.kernels.launch import launch

Part = tuple[torch.Tensor, torch.Tensor]
QUERIES, WARPS = 32, 4


def join(parts: list[Part], sinks: torch.Tensor) -> Part:
    """Return (out, lse) with sinks, from plain attention over one or two sets of keys.

    Args:
        parts: for each set, out [batch, heads, queries, head_dim] with a contiguous last axis and
            lse [batch, heads, queries] in fp32. The first out is overwritten.
        sinks: [heads].
    """
    if not parts[0][0].is_cuda:
        return _join_plainly(parts, sinks)
    (out, lse), (more, more_lse) = ((out, lse.contiguous()) for out, lse in (parts[0], parts[-1]))
    batch, heads, queries, dim = out.shape
    total = torch.empty_like(lse)
    launch(
        join_kernel,
        (-(-queries // QUERIES), heads, batch),
        *(out, lse, more, more_lse, sinks.contiguous(), total),
        *(*out.stride()[:3], *more.stride()[:3], queries),
        HAS_MORE=len(parts) == 2,
        QUERIES=QUERIES,
        D=dim,
        num_warps=WARPS,
    )
    return out, total


def _join_plainly(parts: list[Part], sinks: torch.Tensor) -> Part:
    total = sinks.float()[:, None].expand(parts[0][1].shape)
    for _, lse in parts:
        total = torch.logaddexp(total, lse)
    shares = [out * torch.exp(lse - total)[..., None] for out, lse in parts]
    return parts[0][0].copy_(torch.stack(shares).sum(0)), total


@triton.jit(do_not_specialize=["queries"])  # a new length must not compile a new kernel
def join_kernel(
    out_ptr, lse_ptr, more_ptr, more_lse_ptr, sinks_ptr, total_ptr,
    out_batch, out_head, out_query, more_batch, more_head, more_query, queries,
    HAS_MORE: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Join one head's tile of queries. Grid: (query tiles, heads, batch)."""
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = query < queries
    of_lse = (batch * tl.num_programs(1) + head) * queries + query
    at = (query.to(tl.int64) * out_query)[:, None] + tl.arange(0, D)[None, :]
    at += batch * out_batch + head.to(tl.int64) * out_head
    sink = tl.load(sinks_ptr + head).to(tl.float32)
    lse = tl.load(lse_ptr + of_lse, mask=inside, other=0.0)
    most = tl.maximum(lse, sink)
    if HAS_MORE:
        more_lse = tl.load(more_lse_ptr + of_lse, mask=inside, other=0.0)
        most = tl.maximum(most, more_lse)
    exponentials = tl.exp(lse - most) + tl.exp(sink - most)
    if HAS_MORE:
        exponentials += tl.exp(more_lse - most)
    total = most + tl.log(exponentials)
    out = tl.load(out_ptr + at, mask=inside[:, None], other=0.0).to(tl.float32)
    out *= tl.exp(lse - total)[:, None]
    if HAS_MORE:
        of_more = (query.to(tl.int64) * more_query)[:, None] + tl.arange(0, D)[None, :]
        of_more += batch * more_batch + head.to(tl.int64) * more_head
        more = tl.load(more_ptr + of_more, mask=inside[:, None], other=0.0).to(tl.float32)
        out += more * tl.exp(more_lse - total)[:, None]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside[:, None])
    tl.store(total_ptr + of_lse, total, mask=inside)
