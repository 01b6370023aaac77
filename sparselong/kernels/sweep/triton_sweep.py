"""The sweep as one Triton kernel over blocks of rows.

A program sweeps its rows alone, 128 columns at a time, which it holds in registers: it subtracts
what all earlier columns passed on, then walks through the block, column by column. The errors lie
in global memory, by columns, where the program's later blocks read them.

Nothing is fused: products, differences and quotients are each rounded to fp32, in the order of the
columns, as in `torch_sweep.py`; where several numbers are added, it is by adjacent pairs. A column
is taken out of the block by a sum with zeros, which is exact. A GPU has fp32 arithmetic in plenty
for this: 17 G products and differences for a weight of 4096 × 2880. Left out: fp64, which consumer
cards are slow at, and tensor cores, whose sums have an order of their own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparselong.kernels.launch import launch
from sparselong.kernels.sweep.torch_sweep import LEAST_SCALE, TRIED
from sparselong.packing import DenseFormat, integer

ROWS, WIDTH = 16, 128
"""Rows and columns of a program's block."""
OPTIONS = {"num_warps": 4, "maxnreg": 255, "enable_fp_fusion": False}
"""Without the limit, the assembler takes fewer registers than there are and spills."""
NEAREST_EVEN = tl.constexpr(12582912.0)
"""1.5 · 2^23: adding and subtracting it rounds numbers below 2^22, ties to even."""


def launch_sweep(
    values: torch.Tensor,
    mask: torch.Tensor | None,
    codes: torch.Tensor | None,
    scale: torch.Tensor | None,
    factor: torch.Tensor,
    inverse: torch.Tensor,
    fmt: DenseFormat,
) -> None:
    """Sweep on a GPU; arguments as in `torch_sweep.sweep`."""
    rows, columns = values.shape
    errors = torch.empty(columns, rows, dtype=torch.float32, device=values.device)
    lowest, highest = integer.code_range(fmt.weight_bits)
    with torch.cuda.device_of(values):
        launch(
            sweep_kernel,
            (-(-rows // ROWS),),
            *(values, values if mask is None else mask, values if codes is None else codes),
            *(values if scale is None else scale, factor, inverse, errors, rows, columns),
            GROUP=fmt.group_size,
            SPARSE=fmt.is_sparse,
            INTEGER=fmt.is_quantized,
            LOWEST=lowest,
            HIGHEST=highest,
            LEAST=LEAST_SCALE,
            TRIED=TRIED,
            ROWS=ROWS,
            WIDTH=WIDTH,
            **OPTIONS,
        )


@triton.jit
def sweep_kernel(
    values_ptr, mask_ptr, codes_ptr, scale_ptr, factor_ptr, inverse_ptr, errors_ptr, rows, columns,
    GROUP: tl.constexpr, SPARSE: tl.constexpr, INTEGER: tl.constexpr, LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr, LEAST: tl.constexpr, TRIED: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Sweep ROWS rows in blocks of WIDTH columns; `errors` is fp32 [columns, rows]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    place = tl.arange(0, WIDTH)
    for block in range(0, columns, WIDTH):
        column = block + place
        inside = column < columns
        at = row[:, None] * columns + column[None, :]
        both = real[:, None] & inside[None, :]
        weight = tl.load(values_ptr + at, mask=both, other=0.0)
        inverse = tl.load(inverse_ptr + column, mask=inside, other=0.0)[None, :]
        kept = tl.zeros([ROWS, WIDTH], tl.int32)
        step = tl.zeros([ROWS], tl.float32)
        for earlier in range(0, block, 4):
            for more in tl.static_range(4):
                before = earlier + more
                error_at = errors_ptr + before * rows + row[:, None]
                error = tl.load(error_at, mask=real[:, None], other=0.0)
                share_at = factor_ptr + before * columns + column[None, :]
                weight -= error * tl.load(share_at, mask=inside[None, :], other=0.0)
        for now in range(tl.minimum(WIDTH, columns - block)):
            current = block + now
            if INTEGER:
                if now % GROUP == 0:
                    group = (place // GROUP == now // GROUP)[None, :]
                    step = _choose_scale(
                        weight, inverse, group, SPARSE, LOWEST, HIGHEST, LEAST, TRIED, ROWS, WIDTH
                    )
                    scale_at = scale_ptr + row * (columns // GROUP) + current // GROUP
                    tl.store(scale_at, step.to(scale_ptr.dtype.element_ty), mask=real)
            if SPARSE:
                if now % 4 == 0:
                    two = _keep_two(weight * inverse, ROWS, WIDTH)
                    kept = tl.where((place // 4 == now // 4)[None, :], two, kept)
            here = (place == now)[None, :]
            value = tl.sum(tl.where(here, weight, 0.0), 1)
            if INTEGER:
                code = _round_to_code(value, step, LOWEST, HIGHEST)
                rounded = _round_to_bf16(code * step)
            else:
                code = value
                rounded = _round_to_bf16(value)
            if SPARSE:
                keep = tl.sum(tl.where(here, kept, 0), 1) != 0
                code, rounded = tl.where(keep, code, 0.0), tl.where(keep, rounded, 0.0)
            if INTEGER:
                tl.store(codes_ptr + row * columns + current, code.to(tl.int8), mask=real)
            error = (value - rounded) * tl.load(inverse_ptr + current)
            tl.store(errors_ptr + current * rows + row, error, mask=real)
            later = inside & (place > now)
            share = tl.load(factor_ptr + current * columns + column, mask=later, other=0.0)
            weight -= error[:, None] * share[None, :]
        tl.store(values_ptr + at, weight, mask=both)
        if SPARSE:
            tl.store(mask_ptr + at, kept.to(tl.int1), mask=both)
        tl.debug_barrier()  # the errors are written before the next block reads them


@triton.jit
def _choose_scale(
    weight, inverse, group, SPARSE: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr,
    LEAST: tl.constexpr, TRIED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the scale of the group of columns [1, WIDTH] for each row, fp32 [ROWS]."""
    weight = tl.where(group, weight, 0.0)
    if SPARSE:
        weight = tl.where(_keep_two(weight * inverse, ROWS, WIDTH) != 0, weight, 0.0)
    largest = tl.div_rn(tl.max(tl.abs(weight), 1), (HIGHEST - LOWEST) / 2)
    chosen = tl.zeros([ROWS], tl.float32)
    least = tl.zeros([ROWS], tl.float32)
    for number in range(TRIED):
        scale = _round_to_bf16(largest * (1.0 - number * 0.0625))
        scale = tl.where(scale == 0.0, LEAST, scale)
        step = scale[:, None]
        code = _round_to_code(weight, step, LOWEST, HIGHEST)
        cost = (weight - _round_to_bf16(code * step)) * inverse
        cost = _add_pairs(cost * cost, ROWS, WIDTH)
        better = (number == 0) | (cost < least)
        chosen = tl.where(better, scale, chosen)
        least = tl.where(better, tl.where(number == 0, cost * 0.5, cost), least)
    return chosen


@triton.jit
def _keep_two(sizes, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return 1 for the two of every four with the largest magnitudes, the first of equal ones."""
    four = tl.arange(0, 4)
    sizes = tl.reshape(tl.abs(sizes), [ROWS * WIDTH // 4, 4])
    mine, other = sizes[:, :, None], sizes[:, None, :]
    first = four[None, None, :] < four[None, :, None]
    ahead = (other > mine) | ((other == mine) & first)
    return tl.reshape((tl.sum(ahead.to(tl.int32), 2) < 2).to(tl.int32), [ROWS, WIDTH])


@triton.jit
def _round_to_code(value, step, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):
    """Return codes as fp32; as `integer.quantize`, which rounds first and then saturates."""
    ratio = tl.minimum(tl.maximum(tl.div_rn(value, step), LOWEST), HIGHEST)
    return (ratio + NEAREST_EVEN) - NEAREST_EVEN


@triton.jit
def _round_to_bf16(value):
    """Round fp32 to the nearest bf16 number, ties to even, as fp32."""
    bits = value.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _add_pairs(terms, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the sums of rows by adding adjacent pairs repeatedly, [ROWS]."""
    for halving in tl.static_range(7):  # pyright: ignore[reportGeneralTypeIssues]
        one, other = tl.split(tl.reshape(terms, [ROWS, WIDTH // 2 >> halving, 2]))
        terms = one + other
    return tl.reshape(terms, [ROWS])
