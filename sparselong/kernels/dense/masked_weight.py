"""The weight of a masked LoRA layer: the sum of master and adapter, pruned and rounded.

    W = M + s·B·A        weight = bf16(q · scale),  q = clamp(round(mask ∘ W / scale))

and the gate of its gradient: a gradient passes where the mask keeps and the code does not saturate,
and is multiplied by s on its way to B·A.
Both are made anew in every pass over a layer. In plain torch that is thirty passes over the weight,
with fp32 copies of it; on a GPU one Triton kernel reads master, patterns and scales once and writes
the result. The arithmetic is the same: sums and quotient in fp32 (the quotient correctly rounded),
ties to even, the product with the scale rounded once to bf16. Only the sum over the rank may be
taken in another order.

The CPU's version, in plain torch, is `masked_weight_torch.py`. Sources: SQFT's SparsePEFT (Muñoz et
al., 2024) prunes the sum; the gate at saturation is that of LSQ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from sparselong.kernels.dense import masked_weight_torch as torch_backend
from sparselong.packing import integer

ROWS, BLOCKS, WARPS = 32, 4, 4
# 4-bit masks of the six patterns (packing/two_four.py), the first in the lowest bits.
PATTERN_MASKS = tl.constexpr(0xCA6953)
NEAREST_EVEN = tl.constexpr(12582912.0)
"""1.5 · 2^23: added and taken away, it leaves numbers below 2^22 rounded, ties to even."""
SMALL_SCALE, ENLARGED = tl.constexpr(2.0**-64), tl.constexpr(2.0**64)
"""A scale below the first, and its weights, are enlarged so much before they are divided: scale,
reciprocal and remainders then have all of their bits."""


@dataclass(frozen=True)
class MaskedWeight:
    """What a masked LoRA weight is made from.

    Attributes:
        master: bf16 [out, in].
        lora_a, lora_b: fp32 [r, in] and [out, r].
        scaling: s.
        patterns: uint8 [out, in/32·3] (packing/two_four.py, checked when they were stored); None
            keeps everything.
        scale: bf16 [out, in/group], none negative; None with 16 bits.
        bits: 4, 8 or 16 (16: rounded to bf16 only).

    Weights of less than 2^31 elements; groups of 32, 64, ... inputs.
    """

    master: torch.Tensor
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: float
    patterns: torch.Tensor | None
    scale: torch.Tensor | None
    bits: int

    def round(self) -> torch.Tensor:
        """The weight that a forward multiplies with, bf16 [out, in]."""
        if not self.master.is_cuda:
            return torch_backend.round_weight(**vars(self))
        weight = torch.empty_like(self.master)
        self._launch(weight, gate=False)
        return weight

    def gate_(self, grad: torch.Tensor) -> torch.Tensor:
        """fp32 gradient [out, in] of the rounded weight → of B·A, in place."""
        if not grad.is_cuda:
            return grad.mul_(torch_backend.passes(**vars(self))).mul_(self.scaling)
        self._launch(grad, gate=True)
        return grad

    def codes(self) -> torch.Tensor:
        """The int8 codes of `round()` (its bf16 values with 16 bits).

        They follow from the rounded weight: bf16 keeps a code times its scale to 2^-9, a quarter
        of a code at most.
        """
        weight = self.round()
        return weight if self.scale is None else integer.quantize(weight, self.scale, self.bits)

    def _launch(self, result: torch.Tensor, gate: bool) -> None:
        rows, columns = self.master.shape
        lowest, highest = (0, 0) if self.scale is None else integer.code_range(self.bits)
        grid = (-(-columns // (32 * BLOCKS)), -(-rows // ROWS))
        rank = self.lora_a.shape[0]
        launch: Any = masked_weight_kernel  # triton's own types know no launch
        with torch.cuda.device_of(result):
            launch[grid](
                *(result, self.master, self.lora_a, self.lora_b),
                self.master if self.patterns is None else self.patterns,
                self.master if self.scale is None else self.scale,
                *(self.scaling, rows, columns, rank, float(lowest), float(highest)),
                GROUP=1 if self.scale is None else columns // self.scale.shape[1],
                HAS_MASK=self.patterns is not None,
                HAS_SCALE=self.scale is not None,
                GATE=gate,
                ROWS=ROWS,
                BLOCKS=BLOCKS,
                num_warps=WARPS,
            )


@triton.jit
def masked_weight_kernel(
    result_ptr, master_ptr, a_ptr, b_ptr, patterns_ptr, scale_ptr,
    scaling, rows, columns, rank, lowest, highest,
    GROUP: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SCALE: tl.constexpr, GATE: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One tile of the rounded weight, or (GATE) of a gradient: it passes, times s, or becomes zero.

    Columns are blocks of 32: a block has one scale, and three bytes of eight patterns, the first
    in the lowest bits.
    """
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
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
        b = tl.load(b_ptr + row[:, None] * rank + r[None, :], mask=by_row, other=0.0)
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
            # A tie goes to the even code: to the lowest one, and from the highest one away. The
            # weights next to such a bound are so far from it that their quotients are no ties.
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
    """Weights [ROWS, BLOCKS, 32] → code · step of [ROWS, BLOCKS, 1].

    One division a block: with its remainder's share the product is the rounded quotient (Markstein,
    1990). Weights saturate first, so that no quotient is beyond fp32.
    """
    enlarge = tl.where(step < SMALL_SCALE, ENLARGED, 1.0)
    divisor = step * enlarge
    inverse = tl.where(step == 0.0, 0.0, tl.div_rn(1.0, tl.where(step == 0.0, 1.0, divisor)))
    weight = tl.minimum(tl.maximum(weight * enlarge, lowest * divisor), highest * divisor)
    ratio = weight * inverse
    ratio = tl.fma(tl.fma(-ratio, divisor, weight), inverse, ratio)
    code = (ratio + NEAREST_EVEN) - NEAREST_EVEN
    return code * step
