"""Triton kernels around the expert products: sorting, gathering, gating, combining.

Entry i of the flattened [tokens, top_k] routing is a (token, expert) pair of token i // top_k.
`positions[i]` is its row after sorting by expert. Entries of one expert keep their order, so the
sort is stable and reproducible. One program per token moves its rows: it reads the token once and
writes it top_k times, or reads its top_k rows and sums them in fp32 in the order of the routing.

If this process holds only some of the experts, or a window of the sorted rows is processed, some
entries have no row: their position is -1. Kernels skip these with PARTIAL.

These kernels are memory-bound, so each reads its inputs once: the gate's backward kernel computes
the gradient of the routing weight in the same pass.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _find_local(index, first_expert, experts, layer_experts, OTHERS: tl.constexpr):
    """Return held experts' numbers from 0; -1 for a wrong index.

    With OTHERS, all that is not held, which includes an index of -1, becomes `experts`.
    """
    expert = index.to(tl.int32)
    if OTHERS:
        local = expert - first_expert
        held = (local >= 0) & (local < experts)
        valid = (expert >= -1) & (expert < layer_experts)
        expert = tl.where(held, local, tl.where(valid, experts, -1))
    return expert


@triton.jit
def count_kernel(
    indices_ptr, ranks_ptr, counts_ptr, entries, experts, first_expert, layer_experts,
    BLOCK: tl.constexpr, EXPERTS: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """Write each entry's rank among its block's entries of the same expert, and block counts.

    counts: [experts, blocks]. A wrong index is not counted. With OTHERS some experts are not held;
    one more row of counts is for the entries of these.
    """
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    real = at < entries
    index = tl.load(indices_ptr + at, mask=real, other=-2)
    expert = _find_local(index, first_expert, experts, layer_experts, OTHERS)
    other = block * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(indices_ptr + other, mask=other < entries, other=-2)
    others = _find_local(index, first_expert, experts, layer_experts, OTHERS)
    before = (expert[:, None] == others[None, :]) & (other[None, :] < at[:, None])
    tl.store(ranks_ptr + at, tl.sum(before.to(tl.int32), 1), mask=real)
    every = tl.arange(0, EXPERTS)
    counts = tl.sum((expert[:, None] == every[None, :]).to(tl.int32), 0)
    tl.store(counts_ptr + every * tl.num_programs(0) + block, counts, mask=every < experts)
    if OTHERS:
        count = tl.sum((expert == experts).to(tl.int32), 0)
        tl.store(counts_ptr + experts * tl.num_programs(0) + block, count)


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
def _list_tiles(
    totals, own, experts, starts_ptr, tile_starts_ptr, tile_expert_ptr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Write an expert's first row and row tiles, from the numbers of rows of all experts."""
    every = tl.arange(0, EXPERTS)
    tiles = (totals + ROWS - 1) // ROWS
    begin = tl.sum(tl.where(every < own, tiles, 0), 0)
    end = begin + tl.sum(tl.where(every == own, tiles, 0), 0)
    row = tl.sum(tl.where(every < own, totals, 0), 0)
    tl.store(starts_ptr + own, row)
    tl.store(tile_starts_ptr + own, begin)
    if own == experts - 1:
        tl.store(starts_ptr + experts, tl.sum(totals, 0))
        tl.store(tile_starts_ptr + experts, end)
    for first in range(begin, end, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        tl.store(tile_expert_ptr + tile, tl.zeros_like(tile) + own, mask=tile < end)


@triton.jit
def place_kernel(
    indices_ptr, ranks_ptr, counts_ptr, totals_ptr, positions_ptr, starts_ptr, tile_starts_ptr,
    tile_expert_ptr, valid_ptr, entries, experts, blocks, first_expert, layer_experts,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EXPERTS: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """Write each entry's row and each expert's first row and row tiles. Grid: blocks + experts.

    valid: 1 if no index is wrong. With OTHERS an entry of another expert has no row.
    """
    every = tl.arange(0, EXPERTS)
    totals = tl.load(totals_ptr + every, mask=every < experts, other=0)
    if tl.program_id(0) < blocks:
        block = tl.program_id(0)
        at = block * BLOCK + tl.arange(0, BLOCK)
        index = tl.load(indices_ptr + at, mask=at < entries, other=0)
        expert = _find_local(index, first_expert, experts, layer_experts, OTHERS)
        inside = (expert >= 0) & (expert < experts)
        start = tl.sum(tl.where(every[None, :] < expert[:, None], totals[None, :], 0), 1)
        real = (at < entries) & inside
        earlier = tl.load(counts_ptr + expert * blocks + block, mask=real, other=0)
        rank = tl.load(ranks_ptr + at, mask=real, other=0)
        position = tl.where(inside, start + earlier + rank, -1 if OTHERS else 0)
        tl.store(positions_ptr + at, position, mask=at < entries)
    else:
        own = tl.program_id(0) - blocks
        _list_tiles(
            totals, own, experts,
            starts_ptr, tile_starts_ptr, tile_expert_ptr, ROWS, BLOCK, EXPERTS,
        )  # fmt: skip
        if own == experts - 1:
            valid = tl.sum(totals, 0)
            if OTHERS:
                valid += tl.load(totals_ptr + experts)
            tl.store(valid_ptr, (valid == entries).to(tl.int32))


@triton.jit
def window_kernel(
    all_positions_ptr, all_starts_ptr, positions_ptr, starts_ptr, tile_starts_ptr, tile_expert_ptr,
    entries, experts, blocks, first_row, rows,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Restrict what `place_kernel` wrote to sorted rows [first_row, first_row + rows).

    They are numbered from 0. Grid: blocks + experts.
    """
    if tl.program_id(0) < blocks:
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        row = tl.load(all_positions_ptr + at, mask=at < entries, other=-1) - first_row
        inside = (row >= 0) & (row < rows)
        tl.store(positions_ptr + at, tl.where(inside, row, -1), mask=at < entries)
    else:
        every = tl.arange(0, EXPERTS)
        real = every < experts
        begin = tl.load(all_starts_ptr + every, mask=real, other=0) - first_row
        end = tl.load(all_starts_ptr + every + 1, mask=real, other=0) - first_row
        begin, end = (  # pyright: ignore[reportGeneralTypeIssues]
            tl.minimum(tl.maximum(begin, 0), rows), tl.minimum(tl.maximum(end, 0), rows),
        )  # fmt: skip
        _list_tiles(
            end - begin, tl.program_id(0) - blocks, experts,
            starts_ptr, tile_starts_ptr, tile_expert_ptr, ROWS, BLOCK, EXPERTS,
        )  # fmt: skip


@triton.jit
def _has_row(positions_ptr, token, TOP_K: tl.constexpr):
    """Return whether any of a token's entries has a row."""
    last = tl.load(positions_ptr + token * TOP_K)
    for choice in tl.static_range(1, TOP_K):  # pyright: ignore[reportGeneralTypeIssues]
        last = tl.maximum(last, tl.load(positions_ptr + token * TOP_K + choice))
    return last >= 0


@triton.jit
def gather_kernel(
    x_ptr, positions_ptr, rows_ptr, experts_ptr, bias_ptr, inner_ptr, width, first_expert,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Copy each token's row to the rows of its entries. Grid: tokens.

    With INNER, also write <x, bias of the entry's expert>, the bias's share of the routing weight's
    gradient, to inner [tokens, top_k]. `first_expert` is the expert of the first bias.
    """
    token = tl.program_id(0).to(tl.int64)
    if PARTIAL:
        if not _has_row(positions_ptr, token, TOP_K):
            return
    at = tl.arange(0, BLOCK)
    real = at < width
    x = tl.load(x_ptr + token * width + at, mask=real, other=0.0)
    for choice in tl.static_range(TOP_K):  # pyright: ignore[reportGeneralTypeIssues]
        entry = token * TOP_K + choice
        row = tl.load(positions_ptr + entry).to(tl.int64)
        mask = real
        if PARTIAL:
            mask = real & (row >= 0)
        tl.store(rows_ptr + row * width + at, x, mask=mask)
        if INNER:
            expert = tl.load(experts_ptr + entry).to(tl.int64) - first_expert
            bias = tl.load(bias_ptr + expert * width + at, mask=mask, other=0.0)
            tl.store(inner_ptr + entry, tl.sum(x.to(tl.float32) * bias.to(tl.float32), 0))


@triton.jit
def combine_kernel(
    rows_ptr, positions_ptr, weights_ptr, out_ptr, width,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr, PARTIAL: tl.constexpr,
    ADD: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Sum weight * row over each token's entries, in fp32, with EXACT in fp64. Grid: tokens.

    With ADD, the sum starts with `out` instead of zero.
    """
    SUM: tl.constexpr = tl.float64 if EXACT else tl.float32  # pyright: ignore[reportAssignmentType]
    token = tl.program_id(0).to(tl.int64)
    if ADD:
        if not _has_row(positions_ptr, token, TOP_K):
            return
    at = tl.arange(0, BLOCK)
    real = at < width
    total = tl.zeros([BLOCK], SUM)
    if ADD:
        total += tl.load(out_ptr + token * width + at, mask=real, other=0.0).to(SUM)
    for choice in tl.static_range(TOP_K):  # pyright: ignore[reportGeneralTypeIssues]
        entry = token * TOP_K + choice
        row = tl.load(positions_ptr + entry).to(tl.int64)
        mask = real
        if PARTIAL:
            mask = real & (row >= 0)
        value = tl.load(rows_ptr + row * width + at, mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED and PARTIAL:
            # A weight without a row may be NaN.
            value *= tl.load(weights_ptr + entry, mask=row >= 0, other=0.0).to(tl.float32)
        elif WEIGHTED:
            value *= tl.load(weights_ptr + entry).to(tl.float32)
        total += value.to(SUM)
    tl.store(out_ptr + token * width + at, total.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def _load_gate_up(gate_up_ptr, row, first, width, BLOCK: tl.constexpr):
    """Load gate and up of a row's columns [first, first + BLOCK) in fp32; they alternate."""
    at = 2 * first + tl.arange(0, 2 * BLOCK)
    both = tl.load(gate_up_ptr + row * (2 * width) + at, mask=at < 2 * width, other=0.0)
    return tl.split(tl.reshape(both.to(tl.float32), [BLOCK, 2]))


@triton.jit
def gate_kernel(
    gate_up_ptr, out_ptr, starts_ptr, experts, width, alpha, limit,
    BLOCK: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Write (up + 1) * gate * sigmoid(alpha * gate) with gate and up clamped.

    Grid: rows, or with PARTIAL an upper bound on them.
    """
    row = tl.program_id(0).to(tl.int64)
    if PARTIAL:
        if row >= tl.load(starts_ptr + experts):
            return
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
    width, alpha, limit,
    BLOCK: tl.constexpr, WEIGHT_GRADIENT: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Write d gate_up of a row from dh, the gradient of h before the routing weight. Grid: entries.

    d weight = <dh, h> + inner, with h recomputed; not written for an entry without a row. dgate_up
    may alias gate_up: each row belongs to one program, and a barrier ensures that its threads have
    read a block before any writes it.
    """
    entry = tl.program_id(0).to(tl.int64)
    row = tl.load(positions_ptr + entry).to(tl.int64)
    if PARTIAL:
        if row < 0:
            return
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
