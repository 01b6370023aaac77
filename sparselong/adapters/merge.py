"""Merge an adapter into MXFP4 weights: round W + s·B·A to MXFP4 again, and measure the loss.

MXFP4's steps are coarse: half a step is 4 to 25 % of a weight. A sum is stored as the nearest code
under the best of three scales: the stored one, the one from the OCP specification, and the next
larger one, which clips nothing. The scale with the smallest squared error of the block wins; a
block whose values do not change keeps its bytes. This loses most of a small change, so `Rounding`
measures the loss and stage 03 reports it.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch

from sparselong.kernels.experts import Adapter
from sparselong.packing import mxfp4


@dataclass
class Rounding:
    """Sums over a stack's weights: W, the change D = s·B·A, and Q, stored in place of W + D."""

    weights: int = 0
    codes_changed: int = 0
    weight_squares: float = 0.0
    change_squares: float = 0.0
    error_squares: float = 0.0
    """Sum of (Q - (W + D))²."""
    kept: float = 0.0
    """Sum of (Q - W) D."""

    def add(self, weight: torch.Tensor, change: torch.Tensor, stored: torch.Tensor) -> None:
        """Add one expert's W, D and Q to the sums."""
        moved = stored - weight
        self.weights += weight.numel()
        self.codes_changed += int((moved != 0).sum())
        self.weight_squares += _sum(weight, weight)
        self.change_squares += _sum(change, change)
        self.error_squares += _sum(moved - change, moved - change)
        self.kept += _sum(moved, change)

    def __add__(self, other: Rounding) -> Rounding:
        """Return the sums over the weights of both."""
        return Rounding(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def summarize(self) -> dict[str, float]:
        """Return the statistics for the manifest.

        `relative_change`: |D| / |W|. `lost`: |Q - (W + D)| / |D|, 1 if no value changed. `kept`:
        the share of D that Q - W contains, 1 if all of it. `values_changed`: share of the weights
        whose value changed. Norms are Frobenius; if D is 0, all are 0.
        """
        change = self.change_squares
        return {
            "relative_change": (change / self.weight_squares) ** 0.5 if change else 0.0,
            "lost": (self.error_squares / change) ** 0.5 if change else 0.0,
            "kept": self.kept / change if change else 0.0,
            "values_changed": self.codes_changed / max(1, self.weights),
        }


def _sum(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left * right).sum(dtype=torch.float64))


@torch.no_grad()
def merge_adapter(
    blocks: torch.Tensor, scales: torch.Tensor, adapter: Adapter
) -> tuple[torch.Tensor, torch.Tensor, Rounding]:
    """Return (blocks, scales, rounding statistics) of W + s·B·A, one expert at a time.

    Args:
        blocks: uint8 [experts, out, in / 32, 16], on the adapter's device or in host memory; so are
            the blocks and scales that are returned.
        scales: uint8 [experts, out, in / 32], likewise.
        adapter: A [experts, r, in], B [experts, out, r] and s.
    """
    merged, new_scales, rounding = torch.empty_like(blocks), torch.empty_like(scales), Rounding()
    for expert in range(blocks.shape[0]):
        own, own_scales = (part[expert].to(adapter.b.device) for part in (blocks, scales))
        weight = mxfp4.decode(own, own_scales, torch.float32)
        b, a = adapter.b[expert].float(), adapter.a[expert].float()
        with torch.autocast(weight.device.type, enabled=False):
            change = adapter.scaling * (b @ a)
        found, found_scales = round_sum(weight + change, own_scales)
        stored = mxfp4.decode(found, found_scales, torch.float32)
        moved = (stored != weight).reshape(*found_scales.shape, mxfp4.BLOCK).any(-1)
        merged[expert] = torch.where(moved[..., None], found, own)
        new_scales[expert] = torch.where(moved, found_scales, own_scales)
        rounding.add(weight, change, stored)
    return merged, new_scales, rounding


def round_sum(total: torch.Tensor, stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round `total` to the nearest MXFP4, each block of 32 under the best scale.

    Args:
        total: [out, in].
        stored: uint8 [out, in / 32], the previous scales; they win ties.
    """
    _, lowest = mxfp4.encode(total)
    larger = (lowest.int() + 1).clamp(max=mxfp4.NAN_SCALE - 1).to(torch.uint8)
    best_scales, best_blocks = stored, mxfp4.encode_at(total, stored)
    best_errors = _errors(total, best_blocks, best_scales)
    for scales in (lowest, larger):
        blocks = mxfp4.encode_at(total, scales)
        errors = _errors(total, blocks, scales)
        better = errors < best_errors
        best_errors = torch.where(better, errors, best_errors)
        best_scales = torch.where(better, scales, best_scales)
        best_blocks = torch.where(better[..., None], blocks, best_blocks)
    return best_blocks, best_scales


def _errors(total: torch.Tensor, blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the squared error of each block of 32, [out, in / 32]."""
    difference = mxfp4.decode(blocks, scales, torch.float32) - total
    return difference.square().reshape(*scales.shape, mxfp4.BLOCK).sum(-1)
