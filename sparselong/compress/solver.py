"""Compress one weight matrix into its 2:4 mask, integer codes, scales and dense masters.

    SparseGPT  →  which two of every four weights are kept, corrected for the pruned ones
    scales     →  one per group of inputs, from the pruned weight, rounded to bf16
    GPTQ       →  codes column by column, each rounding error passed on to later kept weights

Pruning, scales, dampening and the factorization are llmcompressor's and compressed-tensors' own
functions. GPTQ's loop over the columns is ours, because llmcompressor's also passes errors on to
pruned weights, which may then round to nonzero codes: after its SparseGPT → GPTQ, some groups are
no longer 2:4. Here both error updates are multiplied by the mask. With a mask of ones, the loop
gives llmcompressor's codes. Errors are taken against bf16(code · scale), the value that a code
represents (see packing/integer.py), so the rounding of that product is compensated as well.

Two conditions that llmcompressor tolerates are errors here: a Hessian that is not positive definite
(llmcompressor warns and uses the identity) and a Hessian that is zero.

The master of a kept weight is the value that GPTQ rounded, stored as a bf16 number that rounds to
the same code: `integer.quantize(master · mask, scale) == codes`, bit for bit. This is nearly always
the nearest bf16 number. If that rounds to an adjacent code, the bf16 number on the other side of
the value is used. One of the two must round correctly, because bf16 numbers below 128 scales are
less than one scale apart. The master of a pruned weight is the original weight.

Left out: activation ordering (it would split groups), zero points, clip search.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparselong.errors import StageError
from sparselong.packing import DenseFormat, integer

BLOCK_COLUMNS = 128
"""Columns solved before their errors are applied to the rest; llmcompressor's default. It affects
results only through rounding and because SparseGPT selects masks block by block."""


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


@torch.no_grad()
def compress_weight(
    weight: torch.Tensor, hessian: torch.Tensor, fmt: DenseFormat, dampening: float, name: str
) -> Compressed:
    """Prune and quantize one weight for the inputs that the Hessian describes.

    Args:
        weight: bf16 or fp32 [out, in]; not changed.
        hessian: fp32 [in, in] on the same device (see hessian.py); not changed.
        fmt: the storage format.
        dampening: added to the Hessian's diagonal, as a fraction of its mean.
        name: the weight's name, for messages.

    Raises:
        StageError: weight or Hessian contains NaN or infinity, the Hessian is zero or not positive
            definite after dampening, or the format cannot store this width.
        ValueError: the shapes of weight and Hessian do not match.
    """
    _check(weight, hessian, fmt, name)
    original = weight.to(torch.bfloat16)
    if not fmt.is_sparse and not fmt.is_quantized:
        return Compressed(original, None, None, original, relative_error(weight, original, hessian))

    solved, factor = factorize(weight, hessian, dampening, name)
    mask = None
    if fmt.is_sparse:
        solved, mask = prune_two_four(weight, hessian, dampening)
    scale = None
    if fmt.is_quantized:
        scale = choose_scale(solved, fmt.weight_bits, fmt.group_size)
        codes, solved = quantize_masked(solved, factor, scale, fmt.weight_bits, mask)
    survivors = solved.to(torch.bfloat16)
    overflowed = int((~torch.isfinite(survivors)).sum())
    if overflowed:
        raise StageError(
            f"compressing {name} overflowed",
            "finite corrected weights",
            f"{overflowed} of {weight.numel()} are NaN or infinite",
            "raise calibration.dampening, or use more calibration samples",
        )
    if scale is None:
        codes = survivors
    else:
        survivors = _round_within_code(solved, codes, scale, fmt.weight_bits)
    master = survivors if mask is None else torch.where(mask, survivors, original)
    result = Compressed(codes, scale, mask, master, 0.0)
    error = relative_error(weight, result.weight(), hessian)
    return Compressed(codes, scale, mask, master, error)


def factorize(
    weight: torch.Tensor, hessian: torch.Tensor, dampening: float, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factorize the inverse of the dampened Hessian.

    Returns:
        An fp32 copy of the weight with zeros in the columns of inputs that were always zero, as in
        llmcompressor, and the upper Cholesky factor, fp32 [in, in].

    Raises:
        StageError: the dampened Hessian is not positive definite in fp32.
    """
    # Imported here because it takes many seconds and rejected weights do not need it.
    from llmcompressor.modifiers.gptq.helpers import factorize_hessian

    solved = weight.float().clone().unsqueeze(0)
    factor = hessian.clone().unsqueeze(0)
    failed = torch.zeros(1, dtype=torch.bool, device=hessian.device)
    try:
        factorize_hessian(solved, factor, dampening, failed)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        failed.fill_(True)
    if bool(failed) or not bool(torch.isfinite(factor).all()):
        eigenvalues = torch.linalg.eigvalsh(hessian.double())
        raise StageError(
            f"the Hessian of {name} could not be factorized",
            f"positive definite after dampening by {dampening:g} of its mean diagonal",
            f"eigenvalues from {eigenvalues[0]:.3g} to {eigenvalues[-1]:.3g} before dampening, "
            f"mean diagonal {hessian.diagonal().mean():.3g}",
            "use more calibration samples, or raise calibration.dampening",
        )
    return solved[0], factor[0]


def prune_two_four(
    weight: torch.Tensor, hessian: torch.Tensor, dampening: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune with llmcompressor's SparseGPT at 2:4; the Hessian must have passed `factorize`.

    A kept weight whose corrected value is zero looks like a pruned one. Among zeros, the mask keeps
    the weight that was larger, or the first one if they were equal.

    Returns:
        The corrected weight, zero where pruned, fp32 [out, in], and the mask, bool [out, in].
    """
    # Imported here for the same reason as in `factorize`.
    from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight

    out_features, in_features = weight.shape
    linear = torch.nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
    _, pruned = sparsify_weight(
        module=linear,
        hessians_dict={linear: hessian.clone()},
        sparsity=0.5,
        prune_n=2,
        prune_m=4,
        block_size=BLOCK_COLUMNS,
        dampening_frac=dampening,
        preserve_sparsity_mask=False,
    )
    rank = weight.float().abs().masked_fill(pruned != 0, torch.inf).reshape(-1, 4)
    kept = rank.sort(dim=-1, descending=True, stable=True).indices[:, :2]
    mask = torch.zeros_like(rank, dtype=torch.bool).scatter_(1, kept, True)
    return pruned, mask.reshape(weight.shape)


def choose_scale(weight: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """Return symmetric scales: the largest magnitude of each group over (2^bits − 1)/2.

    Args:
        weight: fp32 [out, in].
        bits: 4 or 8.
        group_size: inputs per scale.

    Returns:
        bf16 [out, in/group_size], never zero.
    """
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationStrategy,
        QuantizationType,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    groups = weight.unflatten(-1, (-1, group_size))
    args = QuantizationArgs(
        num_bits=bits,
        type=QuantizationType.INT,
        symmetric=True,
        strategy=QuantizationStrategy.GROUP,
        group_size=group_size,
        scale_dtype=torch.bfloat16,
    )
    scale, _ = calculate_qparams(groups.amin(dim=-1), groups.amax(dim=-1), args)
    return scale.to(torch.bfloat16)


def quantize_masked(
    weight: torch.Tensor,
    factor: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize with GPTQ, passing errors on to kept weights only (Frantar et al. 2022, §3).

    Args:
        weight: fp32 [out, in], zeros where pruned; not changed.
        factor: fp32 [in, in] from `factorize`.
        scale: bf16 [out, in/group].
        bits: 4 or 8.
        mask: bool [out, in], or None to keep everything.

    Returns:
        int8 codes [out, in], and each weight's value just before rounding, fp32 [out, in].
    """
    work = weight.clone()
    keep = torch.ones_like(work, dtype=torch.bool) if mask is None else mask
    codes = torch.empty_like(work, dtype=torch.int8)
    in_features = weight.shape[1]
    group_size = in_features // scale.shape[1]
    for start in range(0, in_features, BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, in_features)
        errors = torch.empty_like(work[:, start:stop])
        for column in range(start, stop):
            later = slice(column + 1, stop)
            value = work[:, column : column + 1]
            column_scale = scale[:, column // group_size, None]
            code = integer.quantize(value, column_scale, bits)
            error = (value - integer.dequantize(code, column_scale)) / factor[column, column]
            work[:, later] -= error * factor[column, later] * keep[:, later]
            codes[:, column : column + 1] = code
            errors[:, column - start : column - start + 1] = error
        work[:, stop:] -= (errors @ factor[start:stop, stop:]) * keep[:, stop:]
    return codes, work


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
    if not bool(torch.isfinite(hessian).all()) or not bool(hessian.diagonal().any()):
        raise StageError(
            f"the Hessian of {name} is unusable",
            "a finite Hessian with a nonzero diagonal",
            "NaN or infinity in it" if bool(hessian.diagonal().any()) else "a diagonal of zeros",
            "check data.train and the base model, and use more calibration samples",
        )
