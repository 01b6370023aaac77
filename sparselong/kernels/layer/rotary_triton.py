"""The Triton kernel of `rotary.py`: rotates a few tokens of a few heads of q or k."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _turn(
    x_ptr, out_ptr, cos, sin, head, heads, at, real,
    stride_xh, stride_xt, stride_oh, stride_ot, half,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate a tile [TOKENS, HEADS, BLOCK] of both halves, at tokens `at`."""
    dim = tl.arange(0, BLOCK)[None, None, :]
    seen = real & (head < heads)[None, :, None] & (dim < half)
    head = head.to(tl.int64)[None, :, None]
    x = x_ptr + at * stride_xt + head * stride_xh + dim
    out = out_ptr + at * stride_ot + head * stride_oh + dim
    low = tl.load(x, mask=seen, other=0.0).to(tl.float32)
    high = tl.load(x + half, mask=seen, other=0.0).to(tl.float32)
    kind = out_ptr.dtype.element_ty
    tl.store(out, (low * cos - high * sin).to(kind), mask=seen)
    tl.store(out + half, (high * cos + low * sin).to(kind), mask=seen)


@triton.jit(do_not_specialize=["tokens"])
def rotate_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_cb, stride_ct, stride_sb, stride_st,
    stride_qob, stride_qoh, stride_qot, stride_kob, stride_koh, stride_kot,
    heads, kv_heads, tokens, half,
    BACK: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate one tile. Grid: (token tiles, groups of q's heads and then of k's, batch)."""
    batch = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    at = token.to(tl.int64)[:, None, None]
    real = (token < tokens)[:, None, None]
    dim = tl.arange(0, BLOCK)[None, None, :]
    known = real & (dim < half)
    cos = tl.load(cos_ptr + batch * stride_cb + at * stride_ct + dim, mask=known, other=0.0)
    sin = tl.load(sin_ptr + batch * stride_sb + at * stride_st + dim, mask=known, other=0.0)
    cos, sin = cos.to(tl.float32), sin.to(tl.float32)
    if BACK:
        sin = -sin
    groups = tl.cdiv(heads, HEADS)
    group = tl.program_id(1)
    head = tl.arange(0, HEADS)
    if group < groups:
        _turn(
            q_ptr + batch * stride_qb, q_out_ptr + batch * stride_qob, cos, sin,
            group * HEADS + head, heads, at, real,
            stride_qh, stride_qt, stride_qoh, stride_qot, half, BLOCK,
        )  # fmt: skip
    else:
        _turn(
            k_ptr + batch * stride_kb, k_out_ptr + batch * stride_kob, cos, sin,
            (group - groups) * HEADS + head, kv_heads, at, real,
            stride_kh, stride_kt, stride_koh, stride_kot, half, BLOCK,
        )  # fmt: skip
