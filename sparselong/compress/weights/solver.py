"""Compress one weight matrix into its 2:4 mask, integer codes, scales and dense masters.

A solver finds mask, scales and codes: `one_sweep.py` by default, `two_sweeps.py` for comparison.
Both take errors against bf16(code · scale), the value that a code represents (packing/integer.py),
so the rounding of that product is compensated as well.

The master of a kept weight is the value that the solver rounded, stored as a bf16 number that
rounds to the same code: `integer.quantize(master · mask, scale) == codes`, bit for bit. This is
nearly always the nearest bf16 number. If that rounds to an adjacent code, the bf16 number on the
other side of the value is used. One of the two must round correctly, because bf16 numbers below 128
scales are less than one scale apart. The master of a pruned weight is the original weight.

Left out: zero points.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparselong.compress.weights import one_sweep, two_sweeps
from sparselong.config import Solver
from sparselong.errors import StageError
from sparselong.packing import DenseFormat, integer

SOLVERS = {"sweep": one_sweep.solve, "llmcompressor": two_sweeps.solve}


@dataclass(frozen=True)
class Compressed:
    """A compressed weight; [out, in] is the shape of the original weight."""

    codes: torch.Tensor
    """int8 codes [out, in], or bf16 values at 16 bits; zeros where pruned."""
    scale: torch.Tensor | None
    """bf16 [out, in/group]; None at 16 bits."""
    mask: torch.Tensor | None
    """bool [out, in], True where kept, exactly two of every four; None without sparsity."""
    master: torch.Tensor
    """bf16 [out, in]: kept weights as corrected, pruned weights unchanged."""
    relative_error: float
    """‖X(W−Ŵ)ᵀ‖ / ‖XWᵀ‖ over the calibration tokens, Frobenius norms."""

    def weight(self) -> torch.Tensor:
        """Return the bf16 weight [out, in] that the codes represent."""
        return self.codes if self.scale is None else integer.dequantize(self.codes, self.scale)


def empty(weight: torch.Tensor, fmt: DenseFormat) -> Compressed:
    """Return a compressed weight of a weight's shape, whose values are yet to be received."""
    codes = weight.new_empty(weight.shape, dtype=torch.int8 if fmt.is_quantized else torch.bfloat16)
    scale = mask = None
    if fmt.is_quantized:
        groups = weight.shape[1] // fmt.group_size
        scale = weight.new_empty(len(weight), groups, dtype=torch.bfloat16)
    if fmt.is_sparse:
        mask = weight.new_empty(weight.shape, dtype=torch.bool)
    return Compressed(codes, scale, mask, weight.new_empty(weight.shape, dtype=torch.bfloat16), 0.0)


@torch.no_grad()
def compress_weight(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    fmt: DenseFormat,
    dampening: float,
    name: str,
    solver: Solver = "sweep",
) -> Compressed:
    """Prune and quantize one weight for the inputs that the Hessian describes.

    Args:
        weight: bf16 or fp32 [out, in]; not changed.
        hessian: fp32 [in, in] on the same device (see hessian.py); not changed.
        fmt: the storage format.
        dampening: added to the Hessian's diagonal, as a fraction of its mean.
        name: the weight's name, for messages.
        solver: the config's `calibration.solver`.

    Raises:
        StageError: the weight contains NaN or infinity, the format cannot store this width, or the
            Hessian is refused by `factorize`.
        ValueError: the shapes of weight and Hessian do not match.
    """
    _check(weight, hessian, fmt, name)
    original = weight.to(torch.bfloat16)
    if not fmt.is_sparse and not fmt.is_quantized:
        return Compressed(original, None, None, original, relative_error(weight, original, hessian))

    values, mask, codes, scale = SOLVERS[solver](weight, hessian, fmt, dampening, name)
    if mask is not None:
        values = torch.where(mask, values, 0.0)
    survivors = values.to(torch.bfloat16)
    overflowed = int((~torch.isfinite(survivors)).sum())
    if overflowed:
        raise StageError(
            f"compressing {name} overflowed",
            "finite corrected weights",
            f"{overflowed} of {weight.numel()} are NaN or infinite",
            "raise calibration.dampening, or use more calibration samples",
        )
    if codes is None or scale is None:
        codes = survivors
    else:
        survivors = _round_within_code(values, codes, scale, fmt.weight_bits)
    master = survivors if mask is None else torch.where(mask, survivors, original)
    result = Compressed(codes, scale, mask, master, 0.0)
    error = relative_error(weight, result.weight(), hessian)
    return Compressed(codes, scale, mask, master, error)


def relative_error(weight: torch.Tensor, compressed: torch.Tensor, hessian: torch.Tensor) -> float:
    """Return ‖X(W−Ŵ)ᵀ‖ / ‖XWᵀ‖ = √(tr(ΔHΔᵀ) / tr(WHWᵀ)), in fp64; 0 if XWᵀ is zero."""
    reference, hessian = weight.double(), hessian.double()
    delta = reference - compressed.double()
    error = float(((delta @ hessian) * delta).sum().clamp(min=0.0))
    signal = float(((reference @ hessian) * reference).sum())
    return (error / signal) ** 0.5 if signal > 0.0 else 0.0


def _round_within_code(
    values: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bits: int
) -> torch.Tensor:
    """Round fp32 values to bf16 numbers, at most one step off, that quantize to the same codes."""
    nearest = values.to(torch.bfloat16)
    crossed = integer.quantize(nearest, scale, bits) != codes
    # One step up or down in magnitude is one step up or down in the bit pattern.
    step = torch.where(nearest.float().abs() < values.abs(), 1, -1).to(torch.int16)
    adjacent = (nearest.view(torch.int16) + step).view(torch.bfloat16)
    return torch.where(crossed, adjacent, nearest)


def _check(weight: torch.Tensor, hessian: torch.Tensor, fmt: DenseFormat, name: str) -> None:
    """Raise if the weight cannot be compressed, before any work; see `compress_weight`."""
    in_features = weight.shape[-1]
    if weight.ndim != 2 or hessian.shape != (in_features, in_features):
        raise ValueError(
            f"{name}: weight [out, in] and Hessian [in, in] expected, "
            f"got {tuple(weight.shape)} and {tuple(hessian.shape)}"
        )
    try:
        fmt.check(name, in_features)
    except ValueError as error:
        raise StageError(
            f"{name} cannot be stored in the configured format",
            f"{fmt.weight_bits} bits, sparsity {fmt.sparsity}, group size {fmt.group_size}",
            str(error),
            "change shared_dense.group_size or shared_dense.sparsity",
        ) from error
    bad_weights = int((~torch.isfinite(weight)).sum())
    if bad_weights:
        raise StageError(
            f"{name} contains weights that are not finite",
            "finite weights",
            f"{bad_weights} of {weight.numel()} are NaN or infinite",
            "download the base checkpoint again, or choose another base model",
        )
