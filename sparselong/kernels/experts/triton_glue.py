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
def _load_local(
    indices_ptr, at, entries, first_expert, experts, layer_experts, OTHERS: tl.constexpr
):  # fmt: skip
    """Load held experts' numbers from 0, and assert that no index is wrong; -1 past the entries.

    With OTHERS, all that is not held, which includes an index of -1, becomes `experts`.
    """
    real = at < entries
    index = tl.load(indices_ptr + at, mask=real, other=0)
    if OTHERS:
        valid = (index >= -1) & (index < layer_experts)
        tl.device_assert(valid, "expert_indices: an index is outside [-1, experts)", mask=real)
    else:
        valid = (index >= 0) & (index < layer_experts)
        tl.device_assert(valid, "expert_indices: an index is outside [0, experts)", mask=real)
    local = index.to(tl.int32) - first_expert
    if OTHERS:
        local = tl.where((local >= 0) & (local < experts), local, experts)
    return tl.where(real, local, -1)


@triton.jit
def sort_kernel(
    indices_ptr, positions_ptr, starts_ptr, tile_starts_ptr, tile_expert_ptr,
    entries, experts, first_expert, layer_experts,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EXPERTS: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """Write the rows of one expert's entries, its first row and its row tiles. Grid: experts.

    A program counts the entries of every expert, then numbers its own in their order. With OTHERS
    some experts are not held, and the grid has one more program for entries of these: they get -1.
    """
    own = tl.program_id(0)
    totals = tl.zeros([EXPERTS], tl.int32)
    for first in range(0, entries, BLOCK):
        at = first + tl.arange(0, BLOCK)
        local = _load_local(
            indices_ptr, at, entries, first_expert, experts, layer_experts, OTHERS
        )  # fmt: skip
        totals += tl.histogram(local, EXPERTS, mask=(local >= 0) & (local < experts))
    if own < experts:
        _list_tiles(
            totals, own, experts,
            starts_ptr, tile_starts_ptr, tile_expert_ptr, ROWS, BLOCK, EXPERTS,
        )  # fmt: skip
    row = tl.sum(tl.where(tl.arange(0, EXPERTS) < own, totals, 0), 0)
    for first in range(0, entries, BLOCK):
        at = first + tl.arange(0, BLOCK)
        local = _load_local(
            indices_ptr, at, entries, first_expert, experts, layer_experts, OTHERS
        )  # fmt: skip
        mine = (local == own).to(tl.int32)
        position = tl.where(own < experts, row + tl.cumsum(mine, 0) - 1, -1)
        tl.store(positions_ptr + at, position, mask=mine != 0)
        row += tl.sum(mine, 0)


@triton.jit
def window_kernel(
    all_positions_ptr, all_starts_ptr, positions_ptr, starts_ptr, tile_starts_ptr, tile_expert_ptr,
    entries, experts, blocks, first_row, rows,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Restrict what `sort_kernel` wrote to sorted rows [first_row, first_row + rows).

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
    rows_ptr, positions_ptr, weights_ptr, residual_ptr, out_ptr, width,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr, PARTIAL: tl.constexpr,
    ADD: tl.constexpr, EXACT: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Sum weight * row over each token's entries, in fp32, with EXACT in fp64. Grid: tokens.

    With ADD, the sum starts with `out` instead of zero. With RESIDUAL, the rounded sum is added to
    the token's row of that, and rounded again.
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
    result = total.to(out_ptr.dtype.element_ty)
    if RESIDUAL:
        residual = tl.load(residual_ptr + token * width + at, mask=real, other=0.0)
        result = (residual.to(tl.float32) + result.to(tl.float32)).to(result.dtype)
    tl.store(out_ptr + token * width + at, result, mask=real)


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
