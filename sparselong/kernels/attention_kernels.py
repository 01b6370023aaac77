"""The Triton kernels under `attention_triton.py`: forward, dq, and dk with dv.

One tile of query rows holds HEADS query heads of one KV head times QUERIES queries (row r is head
r // QUERIES, query r % QUERIES). A full layer takes one head and many queries. A window layer takes
the whole group of heads and few queries: its keys are then read once for all heads, and nearly all
of them lie inside the window.

Which keys query i of position p = offset + i sees: floor(p) <= j <= p, where floor is the start of
p's document (array `starts`, by position) or p - window + 1, whichever is later. Both ends grow
with p, so a tile's keys are one range [low, high), and a key block's queries are one range as well.
With SPLIT the range is taken in three parts: a masked head (documents begin in it), a middle that
needs no mask, and a masked tail (the diagonal). Without, it is masked throughout, in one loop: a
window's range is short, and a loop of few steps spends its time starting.

The forward pass keeps scores in base 2 (exp2 is one instruction), starts its running maximum at a
finite -1e30 so that a row that has seen no key yet gives no NaN, and takes the sink in at the end:
one more logit with no value. P and dS are rounded to the inputs' type before the products, sums are
fp32. Every output element is written by exactly one program, in a fixed order: no atomics, and the
same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NO_KEY_YET = tl.constexpr(-1e30)
# Not compiled for: a new length must not mean a new kernel.
SIZES = ["heads", "queries", "keys", "offset", "window"]


@triton.jit
def _load_rows(base, row_offsets, real, dim, MASKED: tl.constexpr):
    """Rows of head_dim elements at `base + row_offsets`; rows that are not real are zero."""
    pointers = base + row_offsets[:, None] + dim[None, :]
    if MASKED:
        return tl.load(pointers, mask=real[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit
def _key_ranges(
    starts, first, last, offset, keys, window,
    KEYS: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_WINDOW: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The tile's keys as (low, unmasked from, unmasked until, high).

    `first` and `last` are the tile's first and last query; `starts` is this batch row's.
    """
    high = tl.minimum(offset + last + 1, keys)
    low = 0
    latest = 0
    if HAS_DOCS:
        low = tl.load(starts + offset + first)
        latest = tl.load(starts + offset + last)
    if HAS_WINDOW:
        low = tl.minimum(tl.maximum(low, offset + first - window + 1), high)
    if not SPLIT:
        return low, low, low, high
    clear = low + tl.cdiv(latest - low, KEYS) * KEYS
    until = tl.minimum(offset + first + 1, keys)
    until = clear + tl.maximum(until - clear, 0) // KEYS * KEYS
    return low, tl.minimum(clear, high), tl.minimum(until, high), high


@triton.jit
def _forward_step(
    state_out, state_max, state_sum, q, k_base, v_base, begin, end, stride_kt, stride_vt,
    position, floor, keys, scale2,
    KEYS: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys [begin, end)."""
    dim = tl.arange(0, D)
    column = tl.arange(0, KEYS)
    for start in range(begin, end, KEYS):
        at = tl.zeros([], tl.int64) + start
        key = start + column
        real = key < keys
        k = _load_rows(k_base + at * stride_kt, column * stride_kt, real, dim, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            seen = (key[None, :] <= position[:, None]) & (key[None, :] >= floor[:, None])
            scores = tl.where(seen & real[None, :], scores, float("-inf"))
        highest = tl.maximum(state_max, tl.max(scores, 1) * scale2)
        p = tl.math.exp2(scores * scale2 - highest[:, None])
        fade = tl.math.exp2(state_max - highest)
        state_sum = state_sum * fade + tl.sum(p, 1)
        state_out = state_out * fade[:, None]
        v = _load_rows(v_base + at * stride_vt, column * stride_vt, real, dim, MASKED)
        state_out = tl.dot(p.to(v.dtype), v, state_out, input_precision=PRECISION)
        state_max = highest
    return state_out, state_max, state_sum


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, sink_ptr, starts_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_ob, stride_oh, stride_ot,
    heads, queries, keys, offset, window, scale,
    GROUP: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_WINDOW: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out and lse of one tile. Grid: (query tiles, heads / HEADS, batch), last queries first."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    head = tl.program_id(1) * HEADS
    batch = tl.program_id(2).to(tl.int64)
    row = tl.arange(0, HEADS * QUERIES)
    query = first + row % QUERIES
    real = query < queries
    last = tl.minimum(first + QUERIES, queries) - 1
    dim = tl.arange(0, D)
    at = first.to(tl.int64)
    row_head = head + row // QUERIES

    q_base = q_ptr + batch * stride_qb + head.to(tl.int64) * stride_qh + at * stride_qt
    rows = (row // QUERIES) * stride_qh + (row % QUERIES) * stride_qt
    q = _load_rows(q_base, rows, real, dim, True)
    kv_head = (head // GROUP).to(tl.int64)
    k_base = k_ptr + batch * stride_kb + kv_head * stride_kh
    v_base = v_ptr + batch * stride_vb + kv_head * stride_vh
    starts = starts_ptr + batch * keys
    position = offset + query
    floor = tl.zeros_like(position)
    if HAS_DOCS:
        floor = tl.load(starts + position, mask=real, other=0)
    if HAS_WINDOW:
        floor = tl.maximum(floor, position - window + 1)

    low, clear, until, high = _key_ranges(
        starts, first, last, offset, keys, window, KEYS, HAS_DOCS, HAS_WINDOW, SPLIT
    )
    scale2 = scale * LOG2E
    acc = tl.zeros([HEADS * QUERIES, D], tl.float32)
    top = tl.full([HEADS * QUERIES], NO_KEY_YET, tl.float32)
    total = tl.zeros([HEADS * QUERIES], tl.float32)
    if SPLIT:
        if HAS_DOCS:
            acc, top, total = _forward_step(
                acc, top, total, q, k_base, v_base, low, clear, stride_kt, stride_vt,
                position, floor, keys, scale2, KEYS, D, True, PRECISION,
            )  # fmt: skip
        acc, top, total = _forward_step(
            acc, top, total, q, k_base, v_base, clear, until, stride_kt, stride_vt,
            position, floor, keys, scale2, KEYS, D, False, PRECISION,
        )  # fmt: skip
    acc, top, total = _forward_step(
        acc, top, total, q, k_base, v_base, until, high, stride_kt, stride_vt,
        position, floor, keys, scale2, KEYS, D, True, PRECISION,
    )  # fmt: skip

    sink2 = tl.load(sink_ptr + row_head).to(tl.float32) * LOG2E
    highest = tl.maximum(top, sink2)
    fade = tl.math.exp2(top - highest)
    total = total * fade + tl.math.exp2(sink2 - highest)
    acc = acc * (fade / total)[:, None]
    lse = (highest + tl.math.log2(total)) * LN2
    out_base = out_ptr + batch * stride_ob + head.to(tl.int64) * stride_oh + at * stride_ot
    out_rows = (row // QUERIES) * stride_oh + (row % QUERIES) * stride_ot
    out = out_base + out_rows[:, None] + dim[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=real[:, None])
    tl.store(lse_ptr + (batch * heads + row_head) * queries + query, lse, mask=real)


@triton.jit
def _dq_step(
    dq, inner, q, do, lse2, delta, k_base, v_base, begin, end, stride_kt, stride_vt,
    position, floor, keys, scale2,
    KEYS: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, SINK_GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, without its last factor `scale`, and rowsum(P * dP) over keys [begin, end)."""
    dim = tl.arange(0, D)
    column = tl.arange(0, KEYS)
    for start in range(begin, end, KEYS):
        at = tl.zeros([], tl.int64) + start
        key = start + column
        real = key < keys
        k = _load_rows(k_base + at * stride_kt, column * stride_kt, real, dim, MASKED)
        v = _load_rows(v_base + at * stride_vt, column * stride_vt, real, dim, MASKED)
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
    """dq of one tile, delta = rowsum(dO * O) for the next kernel, and this tile's share of dsink.

    Grid as `forward_kernel`. `dsink_ptr` is [batch, heads, query tiles], summed by the launcher.
    The sink's gradient takes delta as rowsum(P * dP), all fp32: out was rounded when it was stored,
    and in a sum over thousands of rows that nearly cancels, the rounding would be what one sees.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    first = tile * QUERIES
    head = tl.program_id(1) * HEADS
    batch = tl.program_id(2).to(tl.int64)
    row = tl.arange(0, HEADS * QUERIES)
    query = first + row % QUERIES
    real = query < queries
    last = tl.minimum(first + QUERIES, queries) - 1
    dim = tl.arange(0, D)
    at = first.to(tl.int64)
    row_head = head + row // QUERIES
    wide_head = head.to(tl.int64)

    q_base = q_ptr + batch * stride_qb + wide_head * stride_qh + at * stride_qt
    q_rows = (row // QUERIES) * stride_qh + (row % QUERIES) * stride_qt
    q = _load_rows(q_base, q_rows, real, dim, True)
    o_base = out_ptr + batch * stride_ob + wide_head * stride_oh + at * stride_ot
    o_rows = (row // QUERIES) * stride_oh + (row % QUERIES) * stride_ot
    out = _load_rows(o_base, o_rows, real, dim, True)
    g_base = do_ptr + batch * stride_gb + wide_head * stride_gh + at * stride_gt
    g_rows = (row // QUERIES) * stride_gh + (row % QUERIES) * stride_gt
    do = _load_rows(g_base, g_rows, real, dim, True)

    statistics = (batch * heads + row_head) * queries + query
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + statistics, delta, mask=real)
    lse2 = tl.load(lse_ptr + statistics, mask=real, other=float("inf")) * LOG2E
    kv_head = (head // GROUP).to(tl.int64)
    k_base = k_ptr + batch * stride_kb + kv_head * stride_kh
    v_base = v_ptr + batch * stride_vb + kv_head * stride_vh
    starts = starts_ptr + batch * keys
    position = offset + query
    floor = tl.zeros_like(position)
    if HAS_DOCS:
        floor = tl.load(starts + position, mask=real, other=0)
    if HAS_WINDOW:
        floor = tl.maximum(floor, position - window + 1)

    low, clear, until, high = _key_ranges(
        starts, first, last, offset, keys, window, KEYS, HAS_DOCS, HAS_WINDOW, SPLIT
    )
    scale2 = scale * LOG2E
    dq = tl.zeros([HEADS * QUERIES, D], tl.float32)
    inner = tl.zeros([HEADS * QUERIES], tl.float32)
    if SPLIT:
        if HAS_DOCS:
            dq, inner = _dq_step(
                dq, inner, q, do, lse2, delta, k_base, v_base, low, clear, stride_kt, stride_vt,
                position, floor, keys, scale2, KEYS, D, True, SINK_GRADIENT, PRECISION,
            )  # fmt: skip
        dq, inner = _dq_step(
            dq, inner, q, do, lse2, delta, k_base, v_base, clear, until, stride_kt, stride_vt,
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
        tl.store(dsink_ptr + tile_heads * tl.num_programs(0) + tile, tl.sum(dsink, 1))
    d_base = dq_ptr + batch * stride_db + wide_head * stride_dh + at * stride_dt
    d_rows = (row // QUERIES) * stride_dh + (row % QUERIES) * stride_dt
    dq = (dq * scale).to(dq_ptr.dtype.element_ty)
    tl.store(d_base + d_rows[:, None] + dim[None, :], dq, mask=real[:, None])


@triton.jit
def _dkdv_step(
    dk, dv, k, v, q_base, do_base, lse_base, delta_base, begin, end,
    stride_qh, stride_qt, stride_gh, stride_gt,
    key, until_position, queries, offset, window, scale2,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
    HAS_DOCS: tl.constexpr, HAS_WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, without its last factor `scale`, and dv over queries [begin, end), HEADS heads at once.

    Scores are computed transposed, [keys, rows], so that P and dS come out of one product in the
    layout in which the next takes them.
    """
    dim = tl.arange(0, D)
    row = tl.arange(0, HEADS * QUERIES)
    q_rows = (row // QUERIES) * stride_qh + (row % QUERIES) * stride_qt
    do_rows = (row // QUERIES) * stride_gh + (row % QUERIES) * stride_gt
    statistics = (row // QUERIES) * queries + row % QUERIES
    for start in range(begin, end, QUERIES):
        at = tl.zeros([], tl.int64) + start
        query = start + row % QUERIES
        real = query < queries
        q = _load_rows(q_base + at * stride_qt, q_rows, real, dim, MASKED)
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
        do = _load_rows(do_base + at * stride_gt, do_rows, real, dim, MASKED)
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
    """The key block's queries as (low, unmasked from, unmasked until, high).

    `first` and `last` are the block's first and last key; `ends` is this batch row's.
    """
    low = tl.maximum(first - offset, 0)
    high = queries
    sure = queries
    if HAS_DOCS:
        high = tl.minimum(high, tl.load(ends + last) - offset)
        sure = tl.minimum(sure, tl.load(ends + first) - offset)
    if HAS_WINDOW:
        high = tl.minimum(high, last + window - offset)
    if not SPLIT:
        return low, low, low, high
    clear = low + tl.cdiv(tl.maximum(last - offset - low, 0), QUERIES) * QUERIES
    until = clear + tl.maximum(sure - clear, 0) // QUERIES * QUERIES
    bound = tl.maximum(high, low)
    return low, tl.minimum(clear, bound), tl.minimum(until, bound), high


@triton.jit(do_not_specialize=SIZES)
def dkdv_kernel(
    q_ptr, k_ptr, v_ptr, ends_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_gb, stride_gh, stride_gt,
    stride_ab, stride_ah, stride_at, stride_bb, stride_bh, stride_bt,
    heads, queries, keys, offset, window, scale,
    GROUP: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_WINDOW: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one key block, over all heads of its group. Grid: (key blocks, KV heads, batch).

    The first key blocks, which most queries see, start first. dk has strides a, dv strides b.
    """
    first = tl.program_id(0) * KEYS
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    column = tl.arange(0, KEYS)
    key = first + column
    real = key < keys
    last = tl.minimum(first + KEYS, keys) - 1
    dim = tl.arange(0, D)
    at = first.to(tl.int64)
    k_base = k_ptr + batch * stride_kb + kv_head * stride_kh + at * stride_kt
    k = _load_rows(k_base, column * stride_kt, real, dim, True)
    v_base = v_ptr + batch * stride_vb + kv_head * stride_vh + at * stride_vt
    v = _load_rows(v_base, column * stride_vt, real, dim, True)
    ends = ends_ptr + batch * keys
    until_position = key
    if HAS_DOCS:
        until_position = tl.load(ends + key, mask=real, other=0)
    low, clear, until, high = _query_ranges(
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
        if SPLIT:
            dk, dv = _dkdv_step(
                dk, dv, k, v, q_base, do_base, lse_base, delta_base, low, clear,
                stride_qh, stride_qt, stride_gh, stride_gt,
                key, until_position, queries, offset, window, scale2,
                HEADS, QUERIES, D, True, HAS_DOCS, HAS_WINDOW, PRECISION,
            )  # fmt: skip
            dk, dv = _dkdv_step(
                dk, dv, k, v, q_base, do_base, lse_base, delta_base, clear, until,
                stride_qh, stride_qt, stride_gh, stride_gt,
                key, until_position, queries, offset, window, scale2,
                HEADS, QUERIES, D, False, HAS_DOCS, HAS_WINDOW, PRECISION,
            )  # fmt: skip
        dk, dv = _dkdv_step(
            dk, dv, k, v, q_base, do_base, lse_base, delta_base, until, high,
            stride_qh, stride_qt, stride_gh, stride_gt,
            key, until_position, queries, offset, window, scale2,
            HEADS, QUERIES, D, True, HAS_DOCS, HAS_WINDOW, PRECISION,
        )  # fmt: skip
    dk_base = dk_ptr + batch * stride_ab + kv_head * stride_ah + at * stride_at
    dk_pointers = dk_base + (column * stride_at)[:, None] + dim[None, :]
    tl.store(dk_pointers, (dk * scale).to(dk_ptr.dtype.element_ty), mask=real[:, None])
    dv_base = dv_ptr + batch * stride_bb + kv_head * stride_bh + at * stride_bt
    dv_pointers = dv_base + (column * stride_bt)[:, None] + dim[None, :]
    tl.store(dv_pointers, dv.to(dv_ptr.dtype.element_ty), mask=real[:, None])
