"""One weight matrix in, its 2:4 mask, integer codes, scales and dense masters out.

    SparseGPT  →  which two of every four weights stay, the survivors making up for the others
    scales     →  one per group of inputs, from the pruned weight, rounded to bf16
    GPTQ       →  codes column by column, each column's rounding error passed on to later survivors

Pruning, scales, dampening and the factorization are llmcompressor's and compressed-tensors' own
functions. GPTQ's loop over the columns is ours, because llmcompressor's passes errors on to pruned
weights too, which then round to something else than zero: after its SparseGPT → GPTQ part of the
groups no longer is 2:4. Here both error updates are multiplied by the mask. With a mask of ones the
loop gives llmcompressor's codes. Errors are taken against bf16(code · scale), the canonical meaning
of a code (see packing/integer.py), so the rounding of that product is compensated as well.

Two things llmcompressor lets pass are errors here: a Hessian that is not positive definite (there
replaced by the identity with a warning) and one without any signal.

The master of a survivor is the value GPTQ rounded, as a bf16 number that still rounds to the same
code: `integer.quantize(master · mask, scale) == codes`, bit for bit. The nearest bf16 number nearly
always does; where it crosses the border to the next code, its neighbour on the other side of the
value is taken. One of the two must lie inside the code's interval, because numbers below 128 scales
are less than one scale apart in bf16. The master of a pruned weight is the weight as it was.

Left out: activation ordering (it would tear groups apart), zero points, clip search.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparselong.errors import StageError
from sparselong.packing import DenseFormat, integer

BLOCK_COLUMNS = 128
"""Columns solved before their errors reach the rest, llmcompressor's default. Results depend on it
only through rounding, and through SparseGPT's choice of masks being made block by block."""


@dataclass(frozen=True)
class Compressed:
    """A compressed weight, shapes as in the [out, in] weight it came from."""

    codes: torch.Tensor
    """int8 codes [out, in], or bf16 values where the format keeps 16 bits; zeros where pruned."""
    scale: torch.Tensor | None
    """bf16 [out, in/group], None with 16 bits."""
    mask: torch.Tensor | None
    """bool [out, in], True where kept, exactly two of every four; None without sparsity."""
    master: torch.Tensor
    """bf16 [out, in]: survivors as corrected, pruned weights as they were."""
    relative_error: float
    """‖X(W−Ŵ)ᵀ‖ / ‖XWᵀ‖ over the calibration tokens, Frobenius norms."""

    def weight(self) -> torch.Tensor:
        """The bf16 weight [out, in] that the codes mean."""
        return self.codes if self.scale is None else integer.dequantize(self.codes, self.scale)


@torch.no_grad()
def compress_weight(
    weight: torch.Tensor, hessian: torch.Tensor, fmt: DenseFormat, dampening: float, name: str
) -> Compressed:
    """Prunes and quantizes one weight for the inputs that the Hessian describes.

    Args:
        weight: bf16 or fp32 [out, in]; not changed.
        hessian: fp32 [in, in] on the same device (see hessian.py); not changed.
        fmt: how the weight is to be stored.
        dampening: added to the Hessian's diagonal, as a fraction of its mean.
        name: the weight's name, for messages.

    Raises:
        StageError: NaN or infinity in weight or Hessian, a Hessian that is zero or not positive
            definite after dampening, or a width that the format cannot store.
        ValueError: weight and Hessian do not fit together.
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
    """The upper Cholesky factor [in, in] of the inverse of the dampened Hessian, in fp32.

    Returns:
        An fp32 copy of the weight with the columns of inputs that were always zero set to zero, as
        llmcompressor does, and the factor.

    Raises:
        StageError: the dampened Hessian is not positive definite in fp32.
    """
    # Imported here: it takes many seconds, and a weight that is refused never gets this far.
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
    """llmcompressor's SparseGPT at 2:4. The Hessian must have passed `factorize`.

    A survivor whose corrected value happens to be zero cannot be told from a pruned weight by its
    value; among zeros the mask keeps the weight that was larger, then the one that comes first.

    Returns:
        The pruned weight with corrected survivors, fp32 [out, in], and the mask, bool [out, in].
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
    """compressed-tensors' symmetric scales: largest magnitude of each group over (2^bits − 1)/2.

    Args:
        weight: fp32 [out, in].

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
    """GPTQ that passes rounding errors on to kept weights only (Frantar et al. 2022, §3).

    Args:
        weight: fp32 [out, in], zeros where the mask drops; not changed.
        factor: from `factorize`.
        scale: bf16 [out, in/group].
        mask: bool [out, in], or None to keep everything.

    Returns:
        int8 codes [out, in], and fp32 [out, in] with each weight's value when it was rounded.
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
    """‖X(W−Ŵ)ᵀ‖ / ‖XWᵀ‖ = √(tr(ΔHΔᵀ) / tr(WHWᵀ)), in fp64; 0 for a weight without any output."""
    reference, hessian = weight.double(), hessian.double()
    delta = reference - compressed.double()
    error = float(((delta @ hessian) * delta).sum().clamp(min=0.0))
    signal = float(((reference @ hessian) * reference).sum())
    return (error / signal) ** 0.5 if signal > 0.0 else 0.0


def _round_within_code(
    values: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bits: int
) -> torch.Tensor:
    """fp32 values → bf16 numbers at most one step away that quantize to the same codes."""
    nearest = values.to(torch.bfloat16)
    crossed = integer.quantize(nearest, scale, bits) != codes
    # One step up or down in magnitude is one step up or down in the bit pattern.
    step = torch.where(nearest.float().abs() < values.abs(), 1, -1).to(torch.int16)
    neighbour = (nearest.view(torch.int16) + step).view(torch.bfloat16)
    return torch.where(crossed, neighbour, nearest)


def _check(weight: torch.Tensor, hessian: torch.Tensor, fmt: DenseFormat, name: str) -> None:
    """Refuses what cannot be compressed, before any work; see `compress_weight`."""
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
            f"{name} cannot be stored in the format asked for",
            f"{fmt.weight_bits} bits, sparsity {fmt.sparsity}, group size {fmt.group_size}",
            str(error),
            "change shared_dense.group_size or shared_dense.sparsity",
        ) from error
    bad_weights = int((~torch.isfinite(weight)).sum())
    if bad_weights:
        raise StageError(
            f"{name} holds weights that are not finite",
            "finite weights",
            f"{bad_weights} of {weight.numel()} are NaN or infinite",
            "download the base checkpoint again, or choose another base model",
        )
    if not bool(torch.isfinite(hessian).all()) or not bool(hessian.diagonal().any()):
        raise StageError(
            f"the calibration of {name} says nothing about its inputs",
            "a finite Hessian with some signal",
            "NaN or infinity in it" if bool(hessian.diagonal().any()) else "zero on its diagonal",
            "check data.train and the base model, and use more calibration samples",
        )
