"""The weight of a masked LoRA layer: the sum of master and adapter, pruned and rounded.

    W = M + s·B·A        weight = bf16(q · scale),  q = clamp(round(mask ∘ W / scale))

and the gate of its gradient: a gradient passes where the mask keeps the weight and the code does
not saturate, and is multiplied by s on its way to B·A. Both are recomputed whenever a layer runs.
Plain torch needs thirty passes over the weight, with fp32 copies of it; on a GPU one Triton kernel
(`masked_weight_triton.py`) reads master, patterns and scales once and writes the weight and, if the
backward pass follows, the gate, one bit a weight. The arithmetic is the same: sums and quotient in
fp32 (the quotient correctly rounded), ties to even, the product with the scale rounded once to
bf16. Only the sum over the rank may be taken in another order. The gradients of A and B take one
more kernel (`factor_gradients.py`).

The CPU's version, in plain torch, is `masked_weight_torch.py`. Sources: SQFT's SparsePEFT (Muñoz et
al., 2024) prunes the sum; the gate at saturation is that of LSQ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparselong.kernels.dense import masked_weight_torch as torch_backend
from sparselong.kernels.dense.factor_gradients import factor_gradients
from sparselong.kernels.dense.masked_weight_triton import masked_weight_kernel
from sparselong.kernels.launch import launch
from sparselong.packing import integer

TILE_ROWS, BLOCKS, WARPS = 32, 4, 4


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
        self._launch(weight, None)
        return weight

    def round_with_gate(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return `round()`'s weight, and the gate for `factor_gradients`.

        The gate tells where the weight's gradient passes: on a GPU a bit a weight, int32
        [out, in/32], the first of 32 the lowest; on a CPU bool [out, in]; None: everywhere.
        """
        if self.patterns is None and self.scale is None:
            return self.round(), None
        if not self.master.is_cuda:
            return self.round(), torch_backend.passes(**vars(self))
        weight = torch.empty_like(self.master)
        rows, columns = weight.shape
        gate = torch.empty(rows, columns // 32, dtype=torch.int32, device=weight.device)
        self._launch(weight, gate)
        return weight, gate

    def factor_gradients(
        self, outer: torch.Tensor, gate: torch.Tensor | None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the gradients of each layer's A and B, fp32.

        Args:
            outer: the rounded weight's gradient, fp32 [out, in]; overwritten on a CPU.
            gate: from `round_with_gate`.
        """
        if outer.is_cuda:
            return factor_gradients(outer, gate, self.pairs, self.scaling)
        return torch_backend.factor_gradients(outer, gate, self.pairs, self.scaling)

    def codes(self) -> torch.Tensor:
        """Return the int8 codes of `round()` (its bf16 values with 16 bits).

        They are recovered from the rounded weight: bf16 keeps a code times its scale to 2^-9, at
        most a quarter of a code.
        """
        weight = self.round()
        return weight if self.scale is None else integer.quantize(weight, self.scale, self.bits)

    def _launch(self, weight: torch.Tensor, gate: torch.Tensor | None) -> None:
        rows, columns = self.master.shape
        lowest, highest = (0, 0) if self.scale is None else integer.code_range(self.bits)
        grid = (-(-columns // (32 * BLOCKS)), -(-rows // TILE_ROWS))
        rank, pairs = self.lora_a.shape[0], (*self.pairs, *self.pairs[-1:] * 2)[:3]
        first = self.lora_b.shape[0]
        second = first + pairs[1][1].shape[0]  # not reached where there are no more layers
        with torch.cuda.device_of(weight):
            launch(
                masked_weight_kernel,
                grid,
                *(weight, weight if gate is None else gate, self.master),
                *(factor for pair in pairs for factor in pair),
                self.master if self.patterns is None else self.patterns,
                self.master if self.scale is None else self.scale,
                *(self.scaling, rows, columns, rank, first, second),
                *(float(lowest), float(highest)),
                GROUP=1 if self.scale is None else columns // self.scale.shape[1],
                HAS_MASK=self.patterns is not None,
                HAS_SCALE=self.scale is not None,
                GATE=gate is not None,
                ROWS=TILE_ROWS,
                BLOCKS=BLOCKS,
                num_warps=WARPS,
            )
