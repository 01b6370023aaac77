"""The Triton kernels under `triton_launch.py`: the forward pass, and what the others share.

One tile of query rows holds HEADS query heads of one KV head times QUERIES queries (row r is head
r // QUERIES, query r % QUERIES). A full layer takes one head and many queries. A window layer takes
the whole group of heads and few queries: its keys are then read once for all heads, and nearly all
of them lie inside the window.

Which keys query i of position p = offset + i sees: floor(p) <= j <= p, where floor is the start of
p's document (array `starts`, by position) or p - window + 1, whichever is later. Both ends grow
with p, so a tile's keys are one range [low, high), and a key block's queries are one range as well.
With SPLIT the part of it that needs no mask is a loop of its own; what is left is the diagonal. The
few tiles in which a document begins are masked throughout, and so is everything without SPLIT: a
window's range is short, and a loop of few steps spends its time starting.

The forward pass keeps scores in base 2 (exp2 is one instruction), starts its running maximum at a
finite -1e30 so that a row that has seen no key yet gives no NaN, and takes the sink in at the end:
one more logit with no value. P is rounded to the inputs' type before the product, sums are fp32.
Every output element is written by exactly one program, in a fixed order: no atomics, and the same
bits every time. So it is in the backward pass (`triton_backward.py`) and where few queries see
many keys (`triton_split.py`).
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
def load_rows(base, row_offsets, real, dim, MASKED: tl.constexpr):
    """Rows of head_dim elements at `base + row_offsets`; rows that are not real are zero."""
    pointers = base + row_offsets[:, None] + dim[None, :]
    if MASKED:
        return tl.load(pointers, mask=real[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit
def place_program(HAS_DOCS: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """(block, blocks, head or group of heads, batch) of the launcher's `_grid`.

    Blocks of one head stand next to each other, so that they share its keys in the cache. Where
    documents are packed the heads do: blocks that take long are then spread over the whole grid
    for one head, and at its end for all of them.
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
    """The tile's first and last query; and of each row the query, whether there is one, its
    position and the first key that it sees. `starts` is this batch row's."""
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
    """[rows, D]: where row r's elements are, of head `head + r // QUERIES`, query `first + r %
    QUERIES`."""
    row = tl.arange(0, HEADS * QUERIES)
    corner = base + batch * stride_b + head.to(tl.int64) * stride_h + first.to(tl.int64) * stride_t
    rows = (row // QUERIES) * stride_h + (row % QUERIES) * stride_t
    return corner + rows[:, None] + tl.arange(0, D)[None, :]


@triton.jit
def key_ranges(
    starts, first, last, offset, keys, window,
    KEYS: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_WINDOW: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The tile's keys as (low, until, high): [low, until) are seen by all its rows."""
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
    """Online softmax over keys [begin, end)."""
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
    """out and lse of one tile. Blocks of the grid are query tiles, last queries first."""
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
