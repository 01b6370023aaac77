"""The Triton kernel of `rotary.py`: rotates a few tokens of a few heads, or copies values."""

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


@triton.jit
def _copy(
    x_ptr, out_ptr, head, heads, at, real,
    stride_xh, stride_xt, stride_oh, stride_ot, half,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy a tile [TOKENS, HEADS, BLOCK] of both halves, at tokens `at`."""
    dim = tl.arange(0, BLOCK)[None, None, :]
    seen = real & (head < heads)[None, :, None] & (dim < half)
    head = head.to(tl.int64)[None, :, None]
    x = x_ptr + at * stride_xt + head * stride_xh + dim
    out = out_ptr + at * stride_ot + head * stride_oh + dim
    low = tl.load(x, mask=seen)
    high = tl.load(x + half, mask=seen)
    kind = out_ptr.dtype.element_ty
    tl.store(out, low.to(kind), mask=seen)
    tl.store(out + half, high.to(kind), mask=seen)


@triton.jit(do_not_specialize=["tokens"])
def rotate_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, v_out_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    stride_cb, stride_ct, stride_cd, stride_sb, stride_st, stride_sd,
    stride_qob, stride_qoh, stride_qot, stride_kob, stride_koh, stride_kot,
    stride_vob, stride_voh, stride_vot,
    heads, kv_heads, tokens, half,
    BACK: tl.constexpr, HAS_VALUES: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate or copy one tile. Grid: (token tiles, groups of heads, batch).

    The groups are q's, then k's, then, with HAS_VALUES, v's, whose tiles are copied.
    """
    batch = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    at = token.to(tl.int64)[:, None, None]
    real = (token < tokens)[:, None, None]
    head = tl.arange(0, HEADS)
    group, groups, kv_groups = tl.program_id(1), tl.cdiv(heads, HEADS), tl.cdiv(kv_heads, HEADS)
    if HAS_VALUES:
        if group >= groups + kv_groups:
            _copy(
                v_ptr + batch * stride_vb, v_out_ptr + batch * stride_vob,
                (group - groups - kv_groups) * HEADS + head, kv_heads, at, real,
                stride_vh, stride_vt, stride_voh, stride_vot, half, BLOCK,
            )  # fmt: skip
            return
    dim = tl.arange(0, BLOCK)[None, None, :]
    known = real & (dim < half)
    cos_at = cos_ptr + batch * stride_cb + at * stride_ct + dim * stride_cd
    sin_at = sin_ptr + batch * stride_sb + at * stride_st + dim * stride_sd
    cos = tl.load(cos_at, mask=known, other=0.0).to(tl.float32)
    sin = tl.load(sin_at, mask=known, other=0.0).to(tl.float32)
    if BACK:
        sin = -sin
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
