"""The Triton kernels of attention's backward pass: dq with delta and dsink, and dk with dv.

P = exp(scale * scores - lse) is recomputed from the saved lse, without a second softmax, and

    dv = P^T dO        dS = P * (dO V^T - delta)        dq = scale dS K        dk = scale dS^T Q

where delta = rowsum(dO * out), and dsink = -sum_i exp(sink - lse_i) delta_i. P and dS are rounded
to the inputs' dtype before the products; sums are fp32. One program sums dq over a query tile's
keys, and one sums dk and dv over a key block's queries, each in a fixed order. Tiles, masks and
SPLIT are as in `triton_forward.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparselong.kernels.attention.triton_forward import (
    LOG2E,
    SIZES,
    key_ranges,
    load_rows,
    place_program,
    place_tile,
    tile_pointers,
)


@triton.jit
def _dq_step(
    dq, inner, q, do, lse2, delta, k_base, v_base, begin, end, stride_kt, stride_vt,
    position, floor, keys, scale2,
    KEYS: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, SINK_GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Accumulate dq, without its last factor `scale`, and rowsum(P * dP) over keys [begin, end)."""
    dim = tl.arange(0, D)
    column = tl.arange(0, KEYS)
    for start in range(begin, end, KEYS):
        at = tl.zeros([], tl.int64) + start
        key = start + column
        real = key < keys
        k = load_rows(k_base + at * stride_kt, column * stride_kt, real, dim, MASKED)
        v = load_rows(v_base + at * stride_vt, column * stride_vt, real, dim, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        p = tl.math.exp2(scores * scale2 - lse2[:, None])
        if MASKED:
            seen = (key[None, :] <= position[:, None]) & (key[None, :] >= floor[:, None])
            p = tl.where(seen & real[None, :], p, 0.0)
        if SINK_GRADIENT:
            inner += tl.sum(p * dp, 1)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq, inner


@triton.jit(do_not_specialize=SIZES)
def dq_kernel(
    q_ptr, k_ptr, v_ptr, sink_ptr, starts_ptr, out_ptr, do_ptr, lse_ptr,
    dq_ptr, delta_ptr, dsink_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_ob, stride_oh, stride_ot,
    stride_gb, stride_gh, stride_gt, stride_db, stride_dh, stride_dt,
    heads, queries, keys, offset, window, scale,
    GROUP: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_WINDOW: tl.constexpr, SPLIT: tl.constexpr,
    SINK_GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dq of one tile, delta = rowsum(dO * O) for the next kernel, and the tile's dsink.

    Grid as for `forward_kernel`. `dsink_ptr` is [batch, heads, query tiles]; the launcher sums it.
    The sink's gradient computes delta as rowsum(P * dP), all in fp32: the stored out is rounded,
    and that error would dominate a sum over thousands of rows that nearly cancels.
    """
    block, tiles, heads_before, batch = place_program(HAS_DOCS, HAS_WINDOW)  # pyright: ignore[reportGeneralTypeIssues]
    tile = tiles - 1 - block
    head = heads_before * HEADS
    row_head = head + tl.arange(0, HEADS * QUERIES) // QUERIES
    starts = starts_ptr + batch * keys
    first, last, query, real, position, floor = place_tile(  # pyright: ignore[reportGeneralTypeIssues]
        tile, starts, queries, offset, window, HEADS, QUERIES, HAS_DOCS, HAS_WINDOW
    )
    q_pointers = tile_pointers(
        q_ptr, stride_qb, stride_qh, stride_qt, batch, head, first, HEADS, QUERIES, D
    )
    out_pointers = tile_pointers(
        out_ptr, stride_ob, stride_oh, stride_ot, batch, head, first, HEADS, QUERIES, D
    )
    do_pointers = tile_pointers(
        do_ptr, stride_gb, stride_gh, stride_gt, batch, head, first, HEADS, QUERIES, D
    )
    q = tl.load(q_pointers, mask=real[:, None], other=0.0)
    out = tl.load(out_pointers, mask=real[:, None], other=0.0)
    do = tl.load(do_pointers, mask=real[:, None], other=0.0)

    statistics = (batch * heads + row_head) * queries + query
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + statistics, delta, mask=real)
    lse2 = tl.load(lse_ptr + statistics, mask=real, other=float("inf")) * LOG2E
    kv_head = (head // GROUP).to(tl.int64)
    k_base = k_ptr + batch * stride_kb + kv_head * stride_kh
    v_base = v_ptr + batch * stride_vb + kv_head * stride_vh
    low, until, high = key_ranges(
        starts, first, last, offset, keys, window, KEYS, HAS_DOCS, HAS_WINDOW, SPLIT
    )
    scale2 = scale * LOG2E
    dq = tl.zeros([HEADS * QUERIES, D], tl.float32)
    inner = tl.zeros([HEADS * QUERIES], tl.float32)
    if SPLIT:
        dq, inner = _dq_step(
            dq, inner, q, do, lse2, delta, k_base, v_base, low, until, stride_kt, stride_vt,
            position, floor, keys, scale2, KEYS, D, False, SINK_GRADIENT, PRECISION,
        )  # fmt: skip
    dq, inner = _dq_step(
        dq, inner, q, do, lse2, delta, k_base, v_base, until, high, stride_kt, stride_vt,
        position, floor, keys, scale2, KEYS, D, True, SINK_GRADIENT, PRECISION,
    )  # fmt: skip
    if SINK_GRADIENT:
        sink2 = tl.load(sink_ptr + row_head).to(tl.float32) * LOG2E
        dsink = tl.reshape(-tl.math.exp2(sink2 - lse2) * inner, [HEADS, QUERIES])
        tile_heads = batch * heads + head + tl.arange(0, HEADS)
        tl.store(dsink_ptr + tile_heads * tiles + tile, tl.sum(dsink, 1))
    pointers = tile_pointers(
        dq_ptr, stride_db, stride_dh, stride_dt, batch, head, first, HEADS, QUERIES, D
    )
    tl.store(pointers, (dq * scale).to(dq_ptr.dtype.element_ty), mask=real[:, None])


@triton.jit
def _dkdv_step(
    dk, dv, k, v, q_base, do_base, lse_base, delta_base, begin, end,
    stride_qh, stride_qt, stride_gh, stride_gt,
    key, until_position, queries, offset, window, scale2,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
    HAS_DOCS: tl.constexpr, HAS_WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Accumulate dk, without its last factor `scale`, and dv over queries [begin, end).

    HEADS heads are taken at once. Scores are computed transposed, [keys, rows], so that P and dS
    have the layout that the next product takes.
    """
    dim = tl.arange(0, D)
    row = tl.arange(0, HEADS * QUERIES)
    q_rows = (row // QUERIES) * stride_qh + (row % QUERIES) * stride_qt
    do_rows = (row // QUERIES) * stride_gh + (row % QUERIES) * stride_gt
    statistics = (row // QUERIES) * queries + row % QUERIES
    for start in range(begin, end, QUERIES):
        at = tl.zeros([], tl.int64) + start
        query = start + row % QUERIES
        real = query < end
        q = load_rows(q_base + at * stride_qt, q_rows, real, dim, MASKED)
        if MASKED:
            lse2 = tl.load(lse_base + start + statistics, mask=real, other=float("inf")) * LOG2E
            delta = tl.load(delta_base + start + statistics, mask=real, other=0.0)
        else:
            lse2 = tl.load(lse_base + start + statistics) * LOG2E
            delta = tl.load(delta_base + start + statistics)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p = tl.math.exp2(scores * scale2 - lse2[None, :])
        if MASKED:
            position = offset + query
            seen = (key[:, None] <= position[None, :]) & real[None, :]
            if HAS_WINDOW:
                seen = seen & (position[None, :] < key[:, None] + window)
            if HAS_DOCS:
                seen = seen & (position[None, :] < until_position[:, None])
            p = tl.where(seen, p, 0.0)
        do = load_rows(do_base + at * stride_gt, do_rows, real, dim, MASKED)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _query_ranges(
    ends, first, last, offset, queries, window,
    QUERIES: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_WINDOW: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Return the key block's queries as (low, clear, high); [clear, high) see all its keys.

    `first` and `last` are the block's first and last key; `ends` is this batch row's.
    """
    low = tl.maximum(first - offset, 0)
    high = queries
    sure = queries
    if HAS_DOCS:
        high = tl.minimum(high, tl.load(ends + last) - offset)
        sure = tl.load(ends + first) - offset
    if HAS_WINDOW:
        high = tl.minimum(high, last + window - offset)
        sure = tl.minimum(sure, first + window - offset)
    if not SPLIT:
        return low, high, high
    clear = high - tl.maximum(high - tl.maximum(last - offset, low), 0) // QUERIES * QUERIES
    if HAS_DOCS or HAS_WINDOW:
        clear = tl.where(sure < high, high, clear)
    return low, clear, high


@triton.jit(do_not_specialize=SIZES)
def dkdv_kernel(
    q_ptr, k_ptr, v_ptr, ends_ptr, order_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_gb, stride_gh, stride_gt,
    stride_ab, stride_ah, stride_at, stride_bb, stride_bh, stride_bt,
    heads, queries, keys, offset, window, scale,
    GROUP: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_WINDOW: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dk (strides a) and dv (strides b) of one key block over all heads of its group.

    Grid blocks are key blocks. Those seen by most queries start first, so that the last to finish
    are short: keys in rising order or, with packed documents, `order_ptr` [batch, key blocks].
    """
    block, blocks, kv_head, batch = place_program(HAS_DOCS, HAS_WINDOW)  # pyright: ignore[reportGeneralTypeIssues]
    kv_head = kv_head.to(tl.int64)
    if HAS_DOCS and not HAS_WINDOW:
        block = tl.load(order_ptr + batch * blocks + block)
    first = block * KEYS
    column = tl.arange(0, KEYS)
    key = first + column
    real = key < keys
    last = tl.minimum(first + KEYS, keys) - 1
    dim = tl.arange(0, D)
    at = first.to(tl.int64)
    k_base = k_ptr + batch * stride_kb + kv_head * stride_kh + at * stride_kt
    k = load_rows(k_base, column * stride_kt, real, dim, True)
    v_base = v_ptr + batch * stride_vb + kv_head * stride_vh + at * stride_vt
    v = load_rows(v_base, column * stride_vt, real, dim, True)
    ends = ends_ptr + batch * keys
    until_position = key
    if HAS_DOCS:
        until_position = tl.load(ends + key, mask=real, other=0)
    low, clear, high = _query_ranges(
        ends, first, last, offset, queries, window, QUERIES, HAS_DOCS, HAS_WINDOW, SPLIT
    )
    scale2 = scale * LOG2E
    dk = tl.zeros([KEYS, D], tl.float32)
    dv = tl.zeros([KEYS, D], tl.float32)
    for part in range(GROUP // HEADS):
        head = kv_head * GROUP + part * HEADS
        q_base = q_ptr + batch * stride_qb + head * stride_qh
        do_base = do_ptr + batch * stride_gb + head * stride_gh
        lse_base = lse_ptr + (batch * heads + head) * queries
        delta_base = delta_ptr + (batch * heads + head) * queries
        dk, dv = _dkdv_step(
            dk, dv, k, v, q_base, do_base, lse_base, delta_base, low, clear,
            stride_qh, stride_qt, stride_gh, stride_gt,
            key, until_position, queries, offset, window, scale2,
            HEADS, QUERIES, D, True, HAS_DOCS, HAS_WINDOW, PRECISION,
        )  # fmt: skip
        if SPLIT:
            dk, dv = _dkdv_step(
                dk, dv, k, v, q_base, do_base, lse_base, delta_base, clear, high,
                stride_qh, stride_qt, stride_gh, stride_gt,
                key, until_position, queries, offset, window, scale2,
                HEADS, QUERIES, D, False, HAS_DOCS, HAS_WINDOW, PRECISION,
            )  # fmt: skip
    dk_base = dk_ptr + batch * stride_ab + kv_head * stride_ah + at * stride_at
    dk_pointers = dk_base + (column * stride_at)[:, None] + dim[None, :]
    tl.store(dk_pointers, (dk * scale).to(dk_ptr.dtype.element_ty), mask=real[:, None])
    dv_base = dv_ptr + batch * stride_bb + kv_head * stride_bh + at * stride_bt
    dv_pointers = dv_base + (column * stride_bt)[:, None] + dim[None, :]
    tl.store(dv_pointers, dv.to(dv_ptr.dtype.element_ty), mask=real[:, None])
