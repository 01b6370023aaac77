"""Few queries over many keys, as in decoding with a cache: the keys are split over programs.

One query of gpt-oss's eight KV heads makes eight tiles, and a GPU has more than a hundred
multiprocessors. A tile's keys are therefore split into parts of `span` keys. The program of a part
writes the softmax over its keys (output and log-sum-exp, fp32), and a second kernel combines the
parts of each row, with the sink:

    lse = log(sum_p exp(lse_p) + exp(sink))        out = sum_p exp(lse_p - lse) out_p

A part in which a row sees no key has log-sum-exp -inf and output 0. The parts depend only on the
sizes and the GPU and are added in a fixed order, so results are bitwise reproducible. There is no
backward pass here: the one in `triton_backward.py` takes out and lse, whichever kernel wrote them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparselong.kernels.attention.triton_forward import (
    LN2,
    LOG2E,
    NO_KEY_YET,
    forward_step,
    key_ranges,
    place_tile,
    tile_pointers,
)

MOST_PARTS = 32
_SIZES = ["heads", "queries", "keys", "offset", "window", "batches", "span"]


@triton.jit(do_not_specialize=_SIZES)
def part_kernel(
    q_ptr, k_ptr, v_ptr, starts_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    heads, queries, keys, offset, window, scale, batches, span,
    GROUP: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write a tile's softmax over a part of the keys. Grid: (parts, heads / HEADS, tiles * batch).

    `out_ptr` is [parts, batch, heads, queries, D] and `lse_ptr`, in base 2, [parts, batch, heads,
    queries], both contiguous.
    """
    part = tl.program_id(0)
    head = tl.program_id(1) * HEADS
    batch = (tl.program_id(2) % batches).to(tl.int64)
    row_head = head + tl.arange(0, HEADS * QUERIES) // QUERIES
    starts = starts_ptr + batch * keys
    first, last, query, real, position, floor = place_tile(  # pyright: ignore[reportGeneralTypeIssues]
        tl.program_id(2) // batches, starts, queries, offset, window,
        HEADS, QUERIES, HAS_DOCS, HAS_WINDOW,
    )  # fmt: skip
    q_pointers = tile_pointers(
        q_ptr, stride_qb, stride_qh, stride_qt, batch, head, first, HEADS, QUERIES, D
    )
    q = tl.load(q_pointers, mask=real[:, None], other=0.0)
    kv_head = (head // GROUP).to(tl.int64)
    k_base = k_ptr + batch * stride_kb + kv_head * stride_kh
    v_base = v_ptr + batch * stride_vb + kv_head * stride_vh
    low, _, high = key_ranges(
        starts, first, last, offset, keys, window, KEYS, HAS_DOCS, HAS_WINDOW, False
    )
    low = tl.maximum(low, part * span)
    high = tl.minimum(high, part * span + span)
    acc = tl.zeros([HEADS * QUERIES, D], tl.float32)
    top = tl.full([HEADS * QUERIES], NO_KEY_YET, tl.float32)
    total = tl.zeros([HEADS * QUERIES], tl.float32)
    acc, top, total = forward_step(
        acc, top, total, q, k_base, v_base, low, high, stride_kt, stride_vt,
        position, floor, high, scale * LOG2E, KEYS, D, True, PRECISION,
    )  # fmt: skip
    seen = total > 0
    acc = acc / tl.where(seen, total, 1.0)[:, None]
    lse2 = tl.where(seen, top + tl.math.log2(total), float("-inf"))
    row = ((part * batches + batch) * heads + row_head) * queries + query
    dim = tl.arange(0, D)
    tl.store(out_ptr + row[:, None] * D + dim[None, :], acc, mask=real[:, None])
    tl.store(lse_ptr + row, lse2, mask=real)


@triton.jit(do_not_specialize=["batches", "parts"])
def combine_kernel(
    part_out_ptr, part_lse_ptr, sink_ptr, out_ptr, lse_ptr,
    stride_ob, stride_oh, stride_ot, batches, parts,
    PARTS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Combine one query's parts, parts <= PARTS, for one head. Grid: (queries, heads, batch)."""
    query, head = tl.program_id(0), tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    queries, heads = tl.num_programs(0), tl.num_programs(1)
    part = tl.arange(0, PARTS)
    row = ((part * batches + batch) * heads + head) * queries + query
    dim = tl.arange(0, D)
    real = part < parts
    lse2 = tl.load(part_lse_ptr + row, mask=real, other=float("-inf"))
    pointers = part_out_ptr + row[:, None] * D + dim[None, :]
    partial = tl.load(pointers, mask=real[:, None], other=0.0)
    sink2 = tl.load(sink_ptr + head).to(tl.float32) * LOG2E
    highest = tl.maximum(tl.max(lse2, 0), sink2)
    weight = tl.math.exp2(lse2 - highest)
    total = tl.sum(weight, 0) + tl.math.exp2(sink2 - highest)
    out = tl.sum(weight[:, None] * partial, 0) / total
    at = batch * stride_ob + head.to(tl.int64) * stride_oh + query.to(tl.int64) * stride_ot
    tl.store(out_ptr + at + dim, out.to(out_ptr.dtype.element_ty))
    lse = (highest + tl.math.log2(total)) * LN2
    tl.store(lse_ptr + (batch * heads + head) * queries + query, lse)
