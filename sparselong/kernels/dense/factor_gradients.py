"""Gradients of LoRA factors from the gradient of the rounded weight, on a GPU.

    G = s · outer ∘ gate        dA = Bᵀ G        dB = G Aᵀ

for up to three layers whose rows follow each other in `outer`, each with its own A and B. G is not
written: a program reads a tile of `outer` once, a few rows at a time, zeroes what the gate stops,
and multiplies it by both factors. It writes the tile's share of dA, summed over its rows, and of
dB, summed over its columns. Whichever program is the last of a column tile, or of a row tile, adds
that tile's shares in a fixed order and multiplies by s, so that the same inputs give the same bits.
Counters tell which one is the last; it sets them back to zero. For a weight of 5120 × 2880 and rank
16 the shares take 11 MB, `outer` 59 MB.

A program takes 16 ranks; a higher rank reads `outer` once for each 16. Tensor cores multiply the
operands as three bf16 parts each and sum in fp32: the error against fp64 is at most twice that of
torch's fp32 products (tests/gpu/test_masked_weight.py), where the factors are larger than 2^-110:
smaller ones have no third part in bf16. The code is ours, under this repository's licence.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from sparselong.kernels.launch import launch

ROWS, STEPS = 16, 16
CONSTANTS = {"ROWS": ROWS, "STEPS": STEPS, "RANKS": 16, "PRECISION": "bf16x6"}
"""A program takes STEPS times ROWS rows, some blocks of 32 columns, a warp each; RANKS ranks."""


def choose_blocks(columns: int) -> int:
    """Return a program's blocks; rows that are not aligned to 16 columns take more registers."""
    return 4 if columns % 16 == 0 else 2


def factor_gradients(
    outer: torch.Tensor,
    gate: torch.Tensor | None,
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    scaling: float,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the gradients of each layer's A and B, fp32, as views of two tensors.

    Args:
        outer: gradient of the rounded weight, fp32 [out, in], contiguous.
        gate: int32 [out, in/32]; bit l of a word is set where the gradient of the l-th of its 32
            weights passes. None: all pass.
        pairs: A [r, in] and B [rows, r] of one to three layers, fp32, contiguous.
        scaling: s.
    """
    (rows, columns), rank = outer.shape, pairs[0][0].shape[0]
    sizes = [b.shape[0] for _, b in pairs]
    tiles = [-(-size // (STEPS * ROWS)) for size in sizes]
    blocks = choose_blocks(columns)
    column_tiles = -(-columns // (32 * blocks))
    like = {"dtype": torch.float32, "device": outer.device}
    a_shares = torch.empty(sum(tiles), rank, columns, **like)
    b_shares = torch.empty(column_tiles, rows, rank, **like)
    grad_a = torch.empty(len(pairs), rank, columns, **like)
    grad_b = torch.empty(rows, rank, **like)
    # Where the first and the second layer end; with fewer than three, no tile is beyond the second.
    row_ends, tile_ends = ((each[0], sum(each[:2])) for each in (sizes, tiles))
    given = (*pairs, pairs[-1], pairs[-1])[:3]
    parts = -(-rank // CONSTANTS["RANKS"])
    with torch.cuda.device_of(outer):
        counters = parts * (3 * column_tiles + sum(tiles))
        stream = torch.cuda.current_stream().cuda_stream
        launch(
            factor_gradients_kernel,
            (parts, column_tiles, sum(tiles)),
            *(outer, outer if gate is None else gate, *(each for pair in given for each in pair)),
            *(a_shares, b_shares, grad_a, grad_b, _counters(outer.device, stream, counters)),
            *(scaling, rows, columns, rank, *row_ends, *tile_ends),
            HAS_GATE=gate is not None,
            **CONSTANTS,
            BLOCKS=blocks,
            num_warps=blocks,
        )
    return list(zip(grad_a.unbind(), grad_b.split(sizes), strict=True))


@functools.cache
def _counters(device: torch.device, stream: int, count: int) -> torch.Tensor:
    """Return zeros, int32 [count], that every launch leaves at zero; each stream has its own."""
    return torch.zeros(count, dtype=torch.int32, device=device)


@triton.jit(do_not_specialize=["rows", "first_rows", "second_rows", "first_tiles", "second_tiles"])
def factor_gradients_kernel(
    outer_ptr, gate_ptr, a_ptr, b_ptr, a2_ptr, b2_ptr, a3_ptr, b3_ptr, a_share_ptr, b_share_ptr,
    grad_a_ptr, grad_b_ptr, arrived_ptr, scaling,
    rows, columns, rank, first_rows, second_rows, first_tiles, second_tiles,
    HAS_GATE: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, BLOCKS: tl.constexpr,
    RANKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write a tile's shares, and add those that are complete with it.

    Grid: (RANKS ranks, column tiles, row tiles). Row tiles from `first_tiles` on are those of the
    second layer, whose rows begin at `first_rows`; from `second_tiles` on of the third.
    """
    tile, column_tile, part = tl.program_id(2), tl.program_id(1), tl.program_id(0)
    tiles, column_tiles = tl.num_programs(2), tl.num_programs(1)
    layer, begin, end, before, after = 0, 0, first_rows, 0, first_tiles
    if tile >= second_tiles:
        a_ptr, b_ptr, layer, begin, end, before, after = (
            a3_ptr, b3_ptr, 2, second_rows, rows, second_tiles, tiles,
        )  # fmt: skip
    elif tile >= first_tiles:
        a_ptr, b_ptr, layer, begin, end, before, after = (
            a2_ptr, b2_ptr, 1, first_rows, second_rows, first_tiles, second_tiles,
        )  # fmt: skip
    r = part * RANKS + tl.arange(0, RANKS)
    block = column_tile * BLOCKS + tl.arange(0, BLOCKS)
    lane = tl.arange(0, 32)
    bit = (1 << lane)[None, None, :]
    # Axes are [blocks, rows or ranks, lanes]: with a warp for each block, warps share no sums of
    # dA, and of dB each has its own, added below; no operand is needed by two warps.
    column = block[:, None] * 32 + lane[None, :]
    real_rank, real_column = r < rank, column < columns
    a_size, b_size = rank * columns, rows * rank
    a_share = tl.zeros([BLOCKS, RANKS, 32], tl.float32)
    a_at = a_ptr + r[None, None, :] * columns + column[:, :, None]
    a = tl.load(a_at, mask=real_column[:, :, None] & real_rank[None, None, :], other=0.0)
    first = begin + (tile - before) * STEPS * ROWS
    for step in tl.range(STEPS, num_stages=1):
        row = first + step * ROWS + tl.arange(0, ROWS)
        real = row < end
        at = row[None, :, None] * columns + column[:, None, :]
        inside = real[None, :, None] & real_column[:, None, :]
        grad = tl.load(outer_ptr + at, mask=inside, other=0.0)
        if HAS_GATE:
            by_block = real[None, :] & (block * 32 < columns)[:, None]
            word_at = gate_ptr + row[None, :] * (columns // 32) + block[:, None]
            word = tl.load(word_at, mask=by_block, other=0)
            grad = tl.where((word[:, :, None] & bit) != 0, grad, 0.0)
        b_at = b_ptr + (row - begin)[None, :] * rank + r[:, None]
        b = tl.load(b_at, mask=real[None, :] & real_rank[:, None], other=0.0)
        b = tl.broadcast_to(b[None, :, :], [BLOCKS, RANKS, ROWS])
        a_share = tl.dot(b, grad, a_share, input_precision=PRECISION)
        b_share = tl.sum(tl.dot(grad, a, input_precision=PRECISION), 0)
        b_at = b_share_ptr + column_tile.to(tl.int64) * b_size + row[:, None] * rank + r[None, :]
        tl.store(b_at, b_share, mask=real[:, None] & real_rank[None, :])
    a_place = r[None, :, None] * columns + column[:, None, :]
    a_mask = real_rank[None, :, None] & real_column[:, None, :]
    tl.store(a_share_ptr + tile.to(tl.int64) * a_size + a_place, a_share, mask=a_mask)
    tl.debug_barrier()  # all threads have written their shares before a counter tells of them
    own = arrived_ptr + (part * 3 + layer) * column_tiles + column_tile
    if tl.atomic_add(own, 1, sem="acq_rel") == after - before - 1:
        total = _add(a_share_ptr + a_place, a_mask, before, after, a_size)
        tl.store(grad_a_ptr + layer * a_size + a_place, total * scaling, mask=a_mask)
        tl.store(own, 0)
    own = arrived_ptr + tl.num_programs(0) * 3 * column_tiles + part * tiles + tile
    if tl.atomic_add(own, 1, sem="acq_rel") == column_tiles - 1:
        for step in range(STEPS):
            row = first + step * ROWS + tl.arange(0, ROWS)
            b_place = row[:, None] * rank + r[None, :]
            b_mask = (row < end)[:, None] & real_rank[None, :]
            total = _add(b_share_ptr + b_place, b_mask, 0, column_tiles, b_size)
            tl.store(grad_b_ptr + b_place, total * scaling, mask=b_mask)
        tl.store(own, 0)


@triton.jit
def _add(share_ptr, mask, begin, end, size):
    """Return the sum of shares [begin, end) in order, read from L2: other programs wrote them."""
    share_ptr += begin * size
    total = tl.zeros(mask.shape, tl.float32)
    for first in range(begin, end, 4):
        for n in tl.static_range(4):  # four loads at a time are on their way
            real = mask & (first + n < end)
            total += tl.load(share_ptr, mask=real, other=0.0, cache_modifier=".cg")
            share_ptr += size
    return total
