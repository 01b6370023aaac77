"""The weight of a masked LoRA layer: the sum of master and adapter, pruned and rounded.

    W = M + s·B·A        weight = bf16(q · scale),  q = clamp(round(mask ∘ W / scale))

and the gate of its gradient: a gradient passes where the mask keeps the weight and the code does
not saturate, and is multiplied by s on its way to B·A. Both are recomputed whenever a layer runs.
Plain torch needs thirty passes over the weight, with fp32 copies of it; on a GPU one Triton kernel
reads master, patterns and scales once and writes the result. The arithmetic is the same: sums and
quotient in fp32 (the quotient correctly rounded), ties to even, the product with the scale rounded
once to bf16. Only the sum over the rank may be taken in another order.

The CPU's version, in plain torch, is `masked_weight_torch.py`. Sources: SQFT's SparsePEFT (Muñoz et
al., 2024) prunes the sum; the gate at saturation is that of LSQ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sparselong.kernels.dense import masked_weight_torch as torch_backend
from sparselong.kernels.launch import launch
from sparselong.packing import integer

TILE_ROWS, BLOCKS, WARPS = 32, 4, 4
# 4-bit masks of the six patterns (packing/two_four.py), the first in the lowest bits.
PATTERN_MASKS = tl.constexpr(0xCA6953)
NEAREST_EVEN = tl.constexpr(12582912.0)
"""1.5 · 2^23: adding and subtracting it rounds numbers below 2^22, ties to even."""
SMALL_SCALE, ENLARGED = tl.constexpr(2.0**-64), tl.constexpr(2.0**64)
"""A scale below the first and its weights are multiplied by the second before the division, so
that scale, reciprocal and remainders keep all of their bits."""


@dataclass(frozen=True)
class MaskedWeight:
    """Tensors and settings that define a masked LoRA weight.

    Attributes:
        master: bf16 [out, in], fewer than 2^31 elements.
        lora_a: fp32 [r, in].
        lora_b: fp32 [out, r].
        scaling: s.
        patterns: uint8 [out, in/32·3] (packing/two_four.py, checked when they were stored); None
            keeps every weight.
        scale: bf16 [out, in/group], non-negative, for groups of 32, 64, ... inputs; None with 16
            bits.
        bits: 4, 8 or 16 (16: rounded to bf16 only).
        more: A and B of further rows, where up to three layers follow each other in `master`:
            `lora_b` then has the first one's. On a GPU each has a multiple of TILE_ROWS rows.
    """

    master: torch.Tensor
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: float
    patterns: torch.Tensor | None
    scale: torch.Tensor | None
    bits: int
    more: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()

    @property
    def pairs(self) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        """A and B of each layer."""
        return (self.lora_a, self.lora_b), *self.more

    def round(self) -> torch.Tensor:
        """Return the weight that the forward pass multiplies by, bf16 [out, in]."""
        if not self.master.is_cuda:
            return torch_backend.round_weight(**vars(self))
        weight = torch.empty_like(self.master)
        self._launch(weight, gate=False)
        return weight

    def gate_(self, grad: torch.Tensor) -> torch.Tensor:
        """Turn the rounded weight's gradient, fp32 [out, in], into that of B·A, in place."""
        if not grad.is_cuda:
            return grad.mul_(torch_backend.passes(**vars(self))).mul_(self.scaling)
        self._launch(grad, gate=True)
        return grad

    def codes(self) -> torch.Tensor:
        """Return the int8 codes of `round()` (its bf16 values with 16 bits).

        They are recovered from the rounded weight: bf16 keeps a code times its scale to 2^-9, at
        most a quarter of a code.
        """
        weight = self.round()
        return weight if self.scale is None else integer.quantize(weight, self.scale, self.bits)

    def _launch(self, result: torch.Tensor, gate: bool) -> None:
        rows, columns = self.master.shape
        lowest, highest = (0, 0) if self.scale is None else integer.code_range(self.bits)
        grid = (-(-columns // (32 * BLOCKS)), -(-rows // TILE_ROWS))
        rank, pairs = self.lora_a.shape[0], (*self.pairs, *self.pairs[-1:] * 2)[:3]
        first = self.lora_b.shape[0]
        second = first + pairs[1][1].shape[0]  # not reached where there are no more layers
        with torch.cuda.device_of(result):
            launch(
                masked_weight_kernel,
                grid,
                *(result, self.master, *(factor for pair in pairs for factor in pair)),
                self.master if self.patterns is None else self.patterns,
                self.master if self.scale is None else self.scale,
                *(self.scaling, rows, columns, rank, first, second),
                *(float(lowest), float(highest)),
                GROUP=1 if self.scale is None else columns // self.scale.shape[1],
                HAS_MASK=self.patterns is not None,
                HAS_SCALE=self.scale is not None,
                GATE=gate,
                ROWS=TILE_ROWS,
                BLOCKS=BLOCKS,
                num_warps=WARPS,
            )


@triton.jit
def masked_weight_kernel(
    result_ptr, master_ptr, a_ptr, b_ptr, a2_ptr, b2_ptr, a3_ptr, b3_ptr, patterns_ptr, scale_ptr,
    scaling, rows, columns, rank, first_rows, second_rows, lowest, highest,
    GROUP: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SCALE: tl.constexpr, GATE: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Write one tile of the rounded weight or, with GATE, scale or zero one tile of a gradient.

    Columns are blocks of 32. A block has one scale, and three bytes with eight patterns, the first
    in the lowest bits. Rows from `first_rows` on take the second A and B, from `second_rows` on the
    third; a tile has rows of one of them.
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
    passes = inside
    by_block = row_inside[:, None] & (block * 32 < columns)[None, :]
    if HAS_MASK:
        bytes_at = patterns_ptr + (row[:, None] * (columns // 32) + block[None, :]) * 3
        word = tl.load(bytes_at, mask=by_block, other=0).to(tl.int32)
        word |= tl.load(bytes_at + 1, mask=by_block, other=0).to(tl.int32) << 8
        word |= tl.load(bytes_at + 2, mask=by_block, other=0).to(tl.int32) << 16
        pattern = (word[:, :, None] >> (lane // 4 * 3)[None, None, :]) & 7
        kept = (PATTERN_MASKS >> (4 * pattern + (lane % 4)[None, None, :])) & 1
        passes = passes & (kept != 0)
    if HAS_SCALE:
        group = row[:, None] * (columns // GROUP) + (block * 32 // GROUP)[None, :]
        step = tl.load(scale_ptr + group, mask=by_block, other=1.0).to(tl.float32)
        step = step[:, :, None]
        if GATE:
            # Ties go to the even code: to the lowest code, and away from the highest. The weights
            # next to such a bound are far enough from it that their quotients are not ties.
            least = tl.where(step == 0.0, float("-inf"), (lowest - 0.5) * step)
            most = tl.where(step == 0.0, float("inf"), (highest + 0.5) * step)
            passes = passes & (weight >= least) & (weight < most)
        else:
            weight = _round(weight, step, lowest, highest)
    if GATE:
        grad = tl.load(result_ptr + at, mask=inside, other=0.0)
        tl.store(result_ptr + at, tl.where(passes, grad * scaling, 0.0), mask=inside)
    else:
        weight = tl.where(passes, weight, 0.0)
        tl.store(result_ptr + at, weight.to(result_ptr.dtype.element_ty), mask=inside)


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
