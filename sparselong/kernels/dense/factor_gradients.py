"""Gradients of LoRA factors from the gradient of the rounded weight, on a GPU.

    G = s · outer ∘ gate        dA = Bᵀ G        dB = G Aᵀ

for up to three layers whose rows follow each other in `outer`, each with its own A and B. G is not
written: a program reads a tile of `outer` once, a few rows at a time, zeroes what the gate stops,
and multiplies it by both factors. It writes the tile's share of dA, summed over its rows, and of
dB, summed over its columns. A second kernel adds the shares in a fixed order and multiplies by s,
so that the same inputs give the same bits. For a weight of 5120 × 2880 and rank 16 the shares take
15 MB, `outer` 59 MB.

A program takes 16 ranks; a higher rank reads `outer` once for each 16. Products and sums are fp32
without tensor cores: the error against fp64 is at most twice that of torch's fp32 products
(tests/gpu/test_masked_weight.py). The code is ours, under this repository's licence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from sparselong.kernels.launch import launch

ROWS, STEPS, BLOCKS, WARPS = 16, 8, 4, 4
CONSTANTS = {"ROWS": ROWS, "STEPS": STEPS, "BLOCKS": BLOCKS, "RANKS": 16}
"""A program takes STEPS times ROWS rows, BLOCKS times 32 columns and RANKS ranks."""
SUM_WIDTH, SUM_DEPTH = 128, 8


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
    column_tiles = -(-columns // (32 * BLOCKS))
    like = {"dtype": torch.float32, "device": outer.device}
    a_shares = torch.empty(sum(tiles), rank, columns, **like)
    b_shares = torch.empty(column_tiles, rows, rank, **like)
    grad_a = torch.empty(len(pairs), rank, columns, **like)
    grad_b = torch.empty(rows, rank, **like)
    # Where the first and the second layer end; with fewer than three, no tile is beyond the second.
    row_ends, tile_ends = ((each[0], sum(each[:2])) for each in (sizes, tiles))
    given = (*pairs, pairs[-1], pairs[-1])[:3]
    with torch.cuda.device_of(outer):
        launch(
            factor_gradients_kernel,
            (-(-rank // CONSTANTS["RANKS"]), column_tiles, sum(tiles)),
            *(outer, outer if gate is None else gate, *(each for pair in given for each in pair)),
            *(a_shares, b_shares, rows, columns, rank, *row_ends, *tile_ends),
            HAS_GATE=gate is not None,
            **CONSTANTS,
            num_warps=WARPS,
        )
        blocks = len(pairs) * -(-rank * columns // SUM_WIDTH) + -(-rows * rank // SUM_WIDTH)
        launch(
            add_shares_kernel,
            (blocks,),
            *(a_shares, b_shares, grad_a, grad_b, scaling, rank * columns, rows * rank),
            *(len(pairs), *tile_ends, sum(tiles), column_tiles),
            WIDTH=SUM_WIDTH,
            DEPTH=SUM_DEPTH,
            num_warps=WARPS,
        )
    return list(zip(grad_a.unbind(), grad_b.split(sizes), strict=True))


@triton.jit(do_not_specialize=["rows", "first_rows", "second_rows", "first_tiles", "second_tiles"])
def factor_gradients_kernel(
    outer_ptr, gate_ptr, a_ptr, b_ptr, a2_ptr, b2_ptr, a3_ptr, b3_ptr, a_share_ptr, b_share_ptr,
    rows, columns, rank, first_rows, second_rows, first_tiles, second_tiles,
    HAS_GATE: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, BLOCKS: tl.constexpr,
    RANKS: tl.constexpr,
):  # fmt: skip
    """Write a tile's shares, before the scaling. Grid: (RANKS ranks, column tiles, row tiles).

    Row tiles from `first_tiles` on are those of the second layer, whose rows begin at `first_rows`;
    from `second_tiles` on of the third.
    """
    COLUMNS: tl.constexpr = BLOCKS * 32
    tile, column_tile = tl.program_id(2), tl.program_id(1)
    begin, end, before = 0, first_rows, 0  # this layer's rows; row tiles of the layers before it
    if tile >= second_tiles:
        a_ptr, b_ptr, begin, end, before = a3_ptr, b3_ptr, second_rows, rows, second_tiles
    elif tile >= first_tiles:
        a_ptr, b_ptr, begin, end, before = a2_ptr, b2_ptr, first_rows, second_rows, first_tiles
    r = tl.program_id(0) * RANKS + tl.arange(0, RANKS)
    block = column_tile * BLOCKS + tl.arange(0, BLOCKS)
    lane = tl.arange(0, 32)
    bit = (1 << lane)[None, None, :]
    column = block[:, None] * 32 + lane[None, :]
    flat = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    b_share_ptr += column_tile.to(tl.int64) * rows * rank
    a_share = tl.zeros([RANKS, COLUMNS], tl.float32)
    # dB's product is taken in pieces of 16 columns, then added. In one piece a thread has two of
    # its 256 sums, and reads shared memory for each multiplication, mostly in bank conflicts.
    piece = tl.reshape(flat, [COLUMNS // 16, 16])[:, :, None]
    by_piece = (r < rank)[None, None, :] & (piece < columns)
    a = tl.load(a_ptr + r[None, None, :] * columns + piece, mask=by_piece, other=0.0)
    for step in tl.range(STEPS, num_stages=1):  # more stages cost registers: fewer programs
        row = begin + ((tile - before) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        real = row < end
        at = row[:, None, None] * columns + column[None, :, :]
        inside = real[:, None, None] & (column < columns)[None, :, :]
        grad = tl.load(outer_ptr + at, mask=inside, other=0.0)
        if HAS_GATE:
            by_block = real[:, None] & (block * 32 < columns)[None, :]
            word_at = gate_ptr + row[:, None] * (columns // 32) + block[None, :]
            word = tl.load(word_at, mask=by_block, other=0)
            grad = tl.where((word[:, :, None] & bit) != 0, grad, 0.0)
        grad = tl.reshape(grad, [ROWS, COLUMNS])
        by_row = real[:, None] & (r < rank)[None, :]
        b_at = b_ptr + (row - begin)[:, None] * rank + r[None, :]
        b = tl.load(b_at, mask=by_row, other=0.0)
        a_share = tl.dot(tl.trans(b), grad, a_share, input_precision="ieee")
        pieces = tl.permute(tl.reshape(grad, [ROWS, COLUMNS // 16, 16]), (1, 0, 2))
        b_share = tl.sum(tl.dot(pieces, a, input_precision="ieee"), 0)
        tl.store(b_share_ptr + row[:, None] * rank + r[None, :], b_share, mask=by_row)
    a_share_ptr += tile.to(tl.int64) * rank * columns
    share_at = a_share_ptr + r[:, None] * columns + flat[None, :]
    tl.store(share_at, a_share, mask=(r < rank)[:, None] & (flat < columns)[None, :])


@triton.jit(do_not_specialize=["layers", "first_tiles", "second_tiles", "tiles", "column_tiles"])
def add_shares_kernel(
    a_share_ptr, b_share_ptr, a_ptr, b_ptr, scaling, a_size, b_size,
    layers, first_tiles, second_tiles, tiles, column_tiles,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Add shares of WIDTH elements of one layer's dA, or of dB, and multiply them by the scaling.

    Grid: blocks of the first layer's dA, of the others', then of all dB.
    """
    blocks = tl.cdiv(a_size, WIDTH)
    place = tl.program_id(0)
    layer = place // blocks
    size, begin, end = b_size, 0, column_tiles
    if layer < layers:
        place -= layer * blocks
        begin = tl.where(layer == 0, 0, tl.where(layer == 1, first_tiles, second_tiles))
        end = tl.where(layer == 0, first_tiles, tl.where(layer == 1, second_tiles, tiles))
        size, b_share_ptr, b_ptr = a_size, a_share_ptr, a_ptr + layer * a_size
    else:
        place -= layers * blocks
    at = place * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for first in range(begin, end, DEPTH):
        share = first + tl.arange(0, DEPTH)
        inside = (share < end)[:, None] & (at < size)[None, :]
        share_at = b_share_ptr + share[:, None].to(tl.int64) * size + at[None, :]
        total += tl.sum(tl.load(share_at, mask=inside, other=0.0), 0)
    tl.store(b_ptr + at, total * scaling, mask=at < size)
