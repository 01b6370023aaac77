"""Triton kernels around the expert products: sorting, gathering, gating, combining.

Entry i of the flattened [tokens, top_k] routing is a (token, expert) pair of token i // top_k.
`positions[i]` is its row after sorting by expert. Entries of one expert keep their order, so the
sort is stable and reproducible. One program per token moves its rows: it reads the token once and
writes it top_k times, or reads its top_k rows and sums them in fp32 in the order of the routing.

These kernels are memory-bound, so each reads its inputs once: the gate's backward kernel computes
the gradient of the routing weight in the same pass.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count_kernel(
    indices_ptr, ranks_ptr, counts_ptr, entries, experts,
    BLOCK: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Write each entry's rank among its block's entries of the same expert, and block counts.

    counts: [experts, blocks]. An index outside [0, experts) is not counted.
    """
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    real = at < entries
    expert = tl.load(indices_ptr + at, mask=real, other=-1).to(tl.int32)
    other = block * BLOCK + tl.arange(0, BLOCK)
    others = tl.load(indices_ptr + other, mask=other < entries, other=-1).to(tl.int32)
    before = (expert[:, None] == others[None, :]) & (other[None, :] < at[:, None])
    tl.store(ranks_ptr + at, tl.sum(before.to(tl.int32), 1), mask=real)
    every = tl.arange(0, EXPERTS)
    counts = tl.sum((expert[:, None] == every[None, :]).to(tl.int32), 0)
    tl.store(counts_ptr + every * tl.num_programs(0) + block, counts, mask=every < experts)


@triton.jit
def scan_kernel(counts_ptr, totals_ptr, blocks, BLOCK: tl.constexpr):
    """Replace counts [experts, blocks] by exclusive prefix sums, and write each expert's total.

    Grid: experts.
    """
    expert = tl.program_id(0)
    total = tl.zeros([], tl.int32)
    for first in range(0, blocks, BLOCK):
        at = first + tl.arange(0, BLOCK)
        pointers = counts_ptr + expert * blocks + at
        count = tl.load(pointers, mask=at < blocks, other=0)
        tl.store(pointers, total + tl.cumsum(count, 0) - count, mask=at < blocks)
        total += tl.sum(count, 0)
    tl.store(totals_ptr + expert, total)


@triton.jit
def place_kernel(
    indices_ptr, ranks_ptr, counts_ptr, totals_ptr, positions_ptr, starts_ptr, tile_starts_ptr,
    tile_expert_ptr, valid_ptr, entries, experts, blocks,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Write each entry's row and each expert's first row and row tiles. Grid: blocks + experts.

    valid: 1 if every index is in [0, experts).
    """
    every = tl.arange(0, EXPERTS)
    totals = tl.load(totals_ptr + every, mask=every < experts, other=0)
    if tl.program_id(0) < blocks:
        block = tl.program_id(0)
        at = block * BLOCK + tl.arange(0, BLOCK)
        expert = tl.load(indices_ptr + at, mask=at < entries, other=0).to(tl.int32)
        inside = (expert >= 0) & (expert < experts)
        start = tl.sum(tl.where(every[None, :] < expert[:, None], totals[None, :], 0), 1)
        real = (at < entries) & inside
        earlier = tl.load(counts_ptr + expert * blocks + block, mask=real, other=0)
        rank = tl.load(ranks_ptr + at, mask=real, other=0)
        tl.store(positions_ptr + at, tl.where(inside, start + earlier + rank, 0), mask=at < entries)
    else:
        own = tl.program_id(0) - blocks
        tiles = (totals + ROWS - 1) // ROWS
        begin = tl.sum(tl.where(every < own, tiles, 0), 0)
        end = begin + tl.sum(tl.where(every == own, tiles, 0), 0)
        row = tl.sum(tl.where(every < own, totals, 0), 0)
        tl.store(starts_ptr + own, row)
        tl.store(tile_starts_ptr + own, begin)
        if own == experts - 1:
            tl.store(starts_ptr + experts, tl.sum(totals, 0))
            tl.store(valid_ptr, (tl.sum(totals, 0) == entries).to(tl.int32))
            tl.store(tile_starts_ptr + experts, end)
        for first in range(begin, end, BLOCK):
            tile = first + tl.arange(0, BLOCK)
            tl.store(tile_expert_ptr + tile, tl.zeros_like(tile) + own, mask=tile < end)


@triton.jit
def gather_kernel(
    x_ptr, positions_ptr, rows_ptr, experts_ptr, bias_ptr, inner_ptr, width,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Copy each token's row to the rows of its entries. Grid: tokens.

    With INNER, also write <x, bias of the entry's expert>, the bias's share of the routing weight's
    gradient, to inner [tokens, top_k].
    """
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    real = at < width
    x = tl.load(x_ptr + token * width + at, mask=real, other=0.0)
    for choice in tl.static_range(TOP_K):  # pyright: ignore[reportGeneralTypeIssues]
        entry = token * TOP_K + choice
        row = tl.load(positions_ptr + entry).to(tl.int64)
        tl.store(rows_ptr + row * width + at, x, mask=real)
        if INNER:
            expert = tl.load(experts_ptr + entry).to(tl.int64)
            bias = tl.load(bias_ptr + expert * width + at, mask=real, other=0.0)
            tl.store(inner_ptr + entry, tl.sum(x.to(tl.float32) * bias.to(tl.float32), 0))


@triton.jit
def combine_kernel(
    rows_ptr, positions_ptr, weights_ptr, out_ptr, width,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Sum weight * row over each token's entries, in fp32. Grid: tokens."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    real = at < width
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(TOP_K):  # pyright: ignore[reportGeneralTypeIssues]
        entry = token * TOP_K + choice
        row = tl.load(positions_ptr + entry).to(tl.int64)
        value = tl.load(rows_ptr + row * width + at, mask=real, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights_ptr + entry).to(tl.float32)
        total += value
    tl.store(out_ptr + token * width + at, total.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def _load_gate_up(gate_up_ptr, row, first, width, BLOCK: tl.constexpr):
    """Load gate and up of a row's columns [first, first + BLOCK) in fp32; they alternate."""
    at = 2 * first + tl.arange(0, 2 * BLOCK)
    both = tl.load(gate_up_ptr + row * (2 * width) + at, mask=at < 2 * width, other=0.0)
    return tl.split(tl.reshape(both.to(tl.float32), [BLOCK, 2]))


@triton.jit
def gate_kernel(gate_up_ptr, out_ptr, width, alpha, limit, BLOCK: tl.constexpr):
    """Write (up + 1) * gate * sigmoid(alpha * gate) with gate and up clamped. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    for first in range(0, width, BLOCK):
        gate, up = _load_gate_up(gate_up_ptr, row, first, width, BLOCK)  # pyright: ignore[reportGeneralTypeIssues]
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        out = (up + 1.0) * gate / (1.0 + tl.exp(-alpha * gate))
        at = first + tl.arange(0, BLOCK)
        tl.store(out_ptr + row * width + at, out.to(out_ptr.dtype.element_ty), mask=at < width)


@triton.jit
def gate_backward_kernel(
    gate_up_ptr, dh_ptr, positions_ptr, weights_ptr, inner_ptr, dgate_up_ptr, dweights_ptr,
    width, alpha, limit, BLOCK: tl.constexpr, WEIGHT_GRADIENT: tl.constexpr,
):  # fmt: skip
    """Write d gate_up of a row from dh, the gradient of h before the routing weight. Grid: entries.

    d weight = <dh, h> + inner, with h recomputed. dgate_up may alias gate_up: each row belongs to
    one program, and a barrier ensures that its threads have read a block before any writes it.
    """
    entry = tl.program_id(0).to(tl.int64)
    row = tl.load(positions_ptr + entry).to(tl.int64)
    weight = tl.load(weights_ptr + entry).to(tl.float32)
    products = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        gate, up = _load_gate_up(gate_up_ptr, row, first, width, BLOCK)  # pyright: ignore[reportGeneralTypeIssues]
        at = first + tl.arange(0, BLOCK)
        dh = tl.load(dh_ptr + row * width + at, mask=at < width, other=0.0).to(tl.float32)
        free_gate = gate <= limit
        free_up = (up >= -limit) & (up <= limit)
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit) + 1.0
        sigmoid = 1.0 / (1.0 + tl.exp(-alpha * gate))
        dup = dh * gate * sigmoid
        products += dup * up
        dgate = dh * up * sigmoid * (1.0 + alpha * gate * (1.0 - sigmoid))
        dgate = tl.where(free_gate, dgate, 0.0) * weight
        dup = tl.where(free_up, dup, 0.0) * weight
        both = tl.reshape(tl.join(dgate, dup), [2 * BLOCK]).to(dgate_up_ptr.dtype.element_ty)
        wide = 2 * first + tl.arange(0, 2 * BLOCK)
        tl.debug_barrier()
        tl.store(dgate_up_ptr + row * (2 * width) + wide, both, mask=wide < 2 * width)
    if WEIGHT_GRADIENT:
        inner = tl.load(inner_ptr + entry) + tl.sum(products, 0)
        tl.store(dweights_ptr + entry, inner.to(dweights_ptr.dtype.element_ty))


@triton.jit
def sum_rows_kernel(
    rows_ptr, weights_ptr, starts_ptr, out_ptr, width,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Write a bias's gradient: each expert's rows times their sorted weights, summed in fp32.

    Grid: (experts, columns).
    """
    expert = tl.program_id(0)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin, end = tl.load(starts_ptr + expert), tl.load(starts_ptr + expert + 1)
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(begin, end, BLOCK):
        row = first + tl.arange(0, BLOCK)
        real = (row < end)[:, None] & (at < width)[None, :]
        pointers = rows_ptr + row.to(tl.int64)[:, None] * width + at[None, :]
        value = tl.load(pointers, mask=real, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights_ptr + row, mask=row < end, other=0.0).to(tl.float32)[:, None]
        total += tl.sum(value, 0)
    pointers = out_ptr + expert.to(tl.int64) * width + at
    tl.store(pointers, total.to(out_ptr.dtype.element_ty), mask=at < width)
