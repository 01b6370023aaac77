"""The Triton kernel of attention's forward pass, and what all attention kernels share.

A tile holds HEADS query heads of one KV head times QUERIES queries: row r is head r // QUERIES,
query r % QUERIES. `tiles.py` sets both. A window layer takes the whole group of heads and few
queries, so that its keys are read once for all heads and nearly all of them lie inside the window.

Query i at position p = offset + i sees the keys j with floor(p) <= j <= p, where floor is the later
of the start of p's document (array `starts`, by position) and p - window + 1. Both bounds grow with
p, so a tile's keys form one range [low, high), and so do a key block's queries. With SPLIT, the
part of the range that needs no mask has a loop of its own, and the masked loop covers the diagonal.
Everything is masked without SPLIT and in the few tiles in which a document begins: a window's range
is short, and starting a second loop would cost more than the mask.

The forward pass keeps scores in base 2, because exp2 is one instruction. Its running maximum starts
at a finite -1e30, so that a row that has seen no key yet gives no NaN. The sink enters at the end,
as one more logit without a value. P is rounded to the inputs' dtype before the product; sums are
fp32. Every output element is written by exactly one program in a fixed order, without atomics, so
results are bitwise reproducible. The same holds for the backward pass (`triton_backward.py`) and
for few queries over many keys (`triton_split.py`). `triton_launch.py` launches these kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NO_KEY_YET = tl.constexpr(-1e30)
# Not specialized: a new length must not compile a new kernel.
SIZES = ["heads", "queries", "keys", "offset", "window"]


@triton.jit
def load_rows(base, row_offsets, real, dim, MASKED: tl.constexpr):
    """Load rows of head_dim elements at `base + row_offsets`; rows that are not real are zero."""
    pointers = base + row_offsets[:, None] + dim[None, :]
    if MASKED:
        return tl.load(pointers, mask=real[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit
def place_program(HAS_DOCS: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Return (block, blocks, head or group of heads, batch) from `triton_launch._grid`.

    Blocks of one head are adjacent in the grid, so that they share its keys in the cache. With
    packed documents, whose blocks differ in length, all heads of one block are adjacent instead:
    the launch order of blocks then holds across heads, and long blocks can start first.
    """
    PACKED: tl.constexpr = HAS_DOCS and not HAS_WINDOW  # pyright: ignore[reportAssignmentType]
    block = tl.program_id(1 if PACKED else 0)
    blocks = tl.num_programs(1 if PACKED else 0)
    return block, blocks, tl.program_id(0 if PACKED else 1), tl.program_id(2).to(tl.int64)


@triton.jit
def place_tile(
    tile, starts, queries, offset, window,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Return (first, last, query, real, position, floor) of a tile.

    `first` and `last` are its first and last query. The others hold for each row its query, whether
    that query exists, its position and the first key that it sees. `starts` is this batch row's.
    """
    first = tile * QUERIES
    last = tl.minimum(first + QUERIES, queries) - 1
    query = first + tl.arange(0, HEADS * QUERIES) % QUERIES
    real = query < queries
    position = offset + query
    floor = tl.zeros_like(position)
    if HAS_DOCS:
        floor = tl.load(starts + position, mask=real, other=0)
    if HAS_WINDOW:
        floor = tl.maximum(floor, position - window + 1)
    return first, last, query, real, position, floor


@triton.jit
def tile_pointers(
    base, stride_b, stride_h, stride_t, batch, head, first,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Return pointers [rows, D] to the elements of a tile.

    Row r is head `head + r // QUERIES`, query `first + r % QUERIES`.
    """
    row = tl.arange(0, HEADS * QUERIES)
    corner = base + batch * stride_b + head.to(tl.int64) * stride_h + first.to(tl.int64) * stride_t
    rows = (row // QUERIES) * stride_h + (row % QUERIES) * stride_t
    return corner + rows[:, None] + tl.arange(0, D)[None, :]


@triton.jit
def key_ranges(
    starts, first, last, offset, keys, window,
    KEYS: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_WINDOW: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Return the tile's keys as (low, until, high); all its rows see [low, until)."""
    high = tl.minimum(offset + last + 1, keys)
    low = 0
    latest = 0
    if HAS_DOCS:
        low = tl.load(starts + offset + first)
        latest = tl.load(starts + offset + last)
    if HAS_WINDOW:
        low = tl.minimum(tl.maximum(low, offset + first - window + 1), high)
        latest = tl.maximum(latest, offset + last - window + 1)
    if not SPLIT:
        return low, low, high
    until = low + tl.maximum(tl.minimum(offset + first + 1, keys) - low, 0) // KEYS * KEYS
    if HAS_DOCS or HAS_WINDOW:
        until = tl.where(latest > low, low, until)
    return low, until, high


@triton.jit
def forward_step(
    state_out, state_max, state_sum, q, k_base, v_base, begin, end, stride_kt, stride_vt,
    position, floor, keys, scale2,
    KEYS: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Continue the online softmax over keys [begin, end)."""
    dim = tl.arange(0, D)
    column = tl.arange(0, KEYS)
    for start in range(begin, end, KEYS):
        at = tl.zeros([], tl.int64) + start
        key = start + column
        real = key < keys
        k = load_rows(k_base + at * stride_kt, column * stride_kt, real, dim, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            seen = (key[None, :] <= position[:, None]) & (key[None, :] >= floor[:, None])
            scores = tl.where(seen & real[None, :], scores, float("-inf"))
        highest = tl.maximum(state_max, tl.max(scores, 1) * scale2)
        p = tl.math.exp2(scores * scale2 - highest[:, None])
        fade = tl.math.exp2(state_max - highest)
        state_sum = state_sum * fade + tl.sum(p, 1)
        state_out = state_out * fade[:, None]
        v = load_rows(v_base + at * stride_vt, column * stride_vt, real, dim, MASKED)
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
    """Write out and lse of one tile. Grid blocks are query tiles, the last queries first."""
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
    q = tl.load(q_pointers, mask=real[:, None], other=0.0)
    kv_head = (head // GROUP).to(tl.int64)
    k_base = k_ptr + batch * stride_kb + kv_head * stride_kh
    v_base = v_ptr + batch * stride_vb + kv_head * stride_vh
    low, until, high = key_ranges(
        starts, first, last, offset, keys, window, KEYS, HAS_DOCS, HAS_WINDOW, SPLIT
    )
    scale2 = scale * LOG2E
    acc = tl.zeros([HEADS * QUERIES, D], tl.float32)
    top = tl.full([HEADS * QUERIES], NO_KEY_YET, tl.float32)
    total = tl.zeros([HEADS * QUERIES], tl.float32)
    if SPLIT:
        acc, top, total = forward_step(
            acc, top, total, q, k_base, v_base, low, until, stride_kt, stride_vt,
            position, floor, keys, scale2, KEYS, D, False, PRECISION,
        )  # fmt: skip
    acc, top, total = forward_step(
        acc, top, total, q, k_base, v_base, until, high, stride_kt, stride_vt,
        position, floor, keys, scale2, KEYS, D, True, PRECISION,
    )  # fmt: skip

    sink2 = tl.load(sink_ptr + row_head).to(tl.float32) * LOG2E
    highest = tl.maximum(top, sink2)
    fade = tl.math.exp2(top - highest)
    total = total * fade + tl.math.exp2(sink2 - highest)
    acc = acc * (fade / total)[:, None]
    lse = (highest + tl.math.log2(total)) * LN2
    out = tile_pointers(
        out_ptr, stride_ob, stride_oh, stride_ot, batch, head, first, HEADS, QUERIES, D
    )
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=real[:, None])
    tl.store(lse_ptr + (batch * heads + row_head) * queries + query, lse, mask=real)
