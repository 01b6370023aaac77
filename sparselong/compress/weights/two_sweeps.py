"""The solver `llmcompressor`: a sweep that prunes, then a sweep that rounds.

    SparseGPT  →  which two of every four weights are kept, corrected for the pruned ones
    scales     →  one per group of inputs, from the pruned weight, rounded to bf16
    GPTQ       →  codes column by column, each rounding error passed on to later kept weights

Pruning and scales are llmcompressor's and compressed-tensors' own functions. GPTQ's loop over the
columns is ours, because llmcompressor's also passes errors on to pruned weights, which may then
round to nonzero codes: after its SparseGPT → GPTQ, some groups are no longer 2:4. Here both error
updates are multiplied by the mask. With a mask of ones, the loop gives llmcompressor's codes.

It is the reference of the default solver (`one_sweep.py`), whose error is smaller.
"""

from __future__ import annotations

import torch

from sparselong.compress.weights.factor import factorize
from sparselong.kernels.sweep import Swept
from sparselong.packing import DenseFormat, integer

BLOCK_COLUMNS = 128
"""Columns solved before their errors are applied to the rest; llmcompressor's default. It affects
results only through rounding and because SparseGPT selects masks block by block."""


def solve(
    weight: torch.Tensor, hessian: torch.Tensor, fmt: DenseFormat, dampening: float, name: str
) -> Swept:
    """Prune and round a weight; arguments and errors as `solver.compress_weight`.

    Returns:
        The result, whose values are zero where pruned.
    """
    values, factor = factorize(weight, hessian, dampening, name)
    mask = codes = scale = None
    if fmt.is_sparse:
        values, mask = prune_two_four(weight, hessian, dampening)
    if fmt.is_quantized:
        scale = choose_scale(values, fmt.weight_bits, fmt.group_size)
        codes, values = quantize_masked(values, factor, scale, fmt.weight_bits, mask)
    return Swept(values, mask, codes, scale)


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
