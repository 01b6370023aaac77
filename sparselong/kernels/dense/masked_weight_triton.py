"""The Triton kernels of `masked_weight.py`."""

from __future__ import annotations

import triton
import triton.language as tl

# 4-bit masks of the six patterns (packing/two_four.py), the first in the lowest bits.
PATTERN_MASKS = tl.constexpr(0xCA6953)
NEAREST_EVEN = tl.constexpr(12582912.0)
"""1.5 · 2^23: adding and subtracting it rounds numbers below 2^22, ties to even."""
SMALL_SCALE, ENLARGED = tl.constexpr(2.0**-64), tl.constexpr(2.0**64)
"""A scale below the first and its weights are multiplied by the second before the division, so
that scale, reciprocal and remainders keep all of their bits."""


@triton.jit
def masked_weight_kernel(
    result_ptr, gate_ptr, master_ptr, a_ptr, b_ptr, a2_ptr, b2_ptr, a3_ptr, b3_ptr,
    patterns_ptr, scale_ptr, scaling, rows, columns, rank, first_rows, second_rows, lowest, highest,
    GROUP: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SCALE: tl.constexpr, GATE: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Write one tile of the rounded weight and, with GATE, of the gate.

    Columns are blocks of 32. A block has one scale, three bytes with eight patterns, the first in
    the lowest bits, and one word of the gate. Rows from `first_rows` on take the second A and B,
    from `second_rows` on the third; a tile has rows of one of them.
    """
    start = tl.program_id(1) * ROWS
    row = start + tl.arange(0, ROWS)
    before = 0  # rows that belong to other factors
    if start >= second_rows:
        a_ptr, b_ptr, before = a3_ptr, b3_ptr, second_rows
    elif start >= first_rows:
        a_ptr, b_ptr, before = a2_ptr, b2_ptr, first_rows
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    lane = tl.arange(0, 32)
    column = block[:, None] * 32 + lane[None, :]
    row_inside, inside_row = row < rows, (column < columns)[None, :, :]
    inside = row_inside[:, None, None] & inside_row
    at = row[:, None, None] * columns + column[None, :, :]
    change = tl.zeros([ROWS, BLOCKS * 32], tl.float32)
    flat = tl.program_id(0) * BLOCKS * 32 + tl.arange(0, BLOCKS * 32)
    for first in range(0, rank, 16):
        r = first + tl.arange(0, 16)
        by_row = row_inside[:, None] & (r < rank)[None, :]
        b_at = b_ptr + (row - before)[:, None] * rank + r[None, :]
        b = tl.load(b_at, mask=by_row, other=0.0)
        by_column = (r < rank)[:, None] & (flat < columns)[None, :]
        a = tl.load(a_ptr + r[:, None] * columns + flat[None, :], mask=by_column, other=0.0)
        change = tl.dot(b, a, change, input_precision="ieee")
    change = tl.reshape(change, [ROWS, BLOCKS, 32])
    weight = tl.load(master_ptr + at, mask=inside, other=0.0).to(tl.float32) + scaling * change
    by_block = row_inside[:, None] & (block * 32 < columns)[None, :]
    if HAS_MASK:
        bytes_at = patterns_ptr + (row[:, None] * (columns // 32) + block[None, :]) * 3
        word = tl.load(bytes_at, mask=by_block, other=0).to(tl.int32)
        word |= tl.load(bytes_at + 1, mask=by_block, other=0).to(tl.int32) << 8
        word |= tl.load(bytes_at + 2, mask=by_block, other=0).to(tl.int32) << 16
        kept = tl.zeros([ROWS, BLOCKS], tl.int32)  # a bit an input, the first of 32 the lowest
        for four in tl.static_range(8):
            pattern = (word >> (3 * four)) & 7
            kept |= ((PATTERN_MASKS >> (4 * pattern)) & 15) << (4 * four)
    bit = (1 << lane)[None, None, :]
    if HAS_SCALE:
        group = row[:, None] * (columns // GROUP) + (block * 32 // GROUP)[None, :]
        step = tl.load(scale_ptr + group, mask=by_block, other=1.0).to(tl.float32)
        step = step[:, :, None]
        if GATE:
            # Ties go to the even code: to the lowest code, and away from the highest. The weights
            # next to such a bound are far enough from it that their quotients are not ties.
            least = tl.where(step == 0.0, float("-inf"), (lowest - 0.5) * step)
            most = tl.where(step == 0.0, float("inf"), (highest + 0.5) * step)
            unsaturated = tl.sum(tl.where((weight >= least) & (weight < most), bit, 0), 2)
        weight = _round(weight, step, lowest, highest)
    if HAS_MASK:
        weight = tl.where((kept[:, :, None] & bit) != 0, weight, 0.0)
    tl.store(result_ptr + at, weight.to(result_ptr.dtype.element_ty), mask=inside)
    if GATE:
        gate = unsaturated if HAS_SCALE else kept
        if HAS_SCALE and HAS_MASK:
            gate &= kept
        gate_at = gate_ptr + row[:, None] * (columns // 32) + block[None, :]
        tl.store(gate_at, gate, mask=by_block)


@triton.jit
def _round(weight, step, lowest, highest):
    """Round weights [ROWS, BLOCKS, 32] to code · step, with a step [ROWS, BLOCKS, 1].

    One division per block: corrected by the remainder, the product with the reciprocal is the
    rounded quotient (Markstein, 1990). Weights saturate first, so that no quotient overflows fp32.
    """
    enlarge = tl.where(step < SMALL_SCALE, ENLARGED, 1.0)
    divisor = step * enlarge
    inverse = tl.where(step == 0.0, 0.0, tl.div_rn(1.0, tl.where(step == 0.0, 1.0, divisor)))
    weight = tl.minimum(tl.maximum(weight * enlarge, lowest * divisor), highest * divisor)
    ratio = weight * inverse
    ratio = tl.fma(tl.fma(-ratio, divisor, weight), inverse, ratio)
    code = (ratio + NEAREST_EVEN) - NEAREST_EVEN
    return code * step
