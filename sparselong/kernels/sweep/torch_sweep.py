"""The sweep in plain torch: the CPU backend, bit for bit the kernel of `triton_sweep.py`."""

from __future__ import annotations

import torch

from sparselong.packing import GROUP, DenseFormat, integer

ROWS_AT_ONCE = 128
"""Rows are independent; so many of gpt-oss's stay in a processor's cache."""
LEAST_SCALE = torch.finfo(torch.bfloat16).eps
"""Scale of a group of zeros, as in compressed-tensors."""
TRIED = 9
"""Scales that are compared: the largest magnitude's times 1, 15/16, … 1/2."""


def sweep(
    values: torch.Tensor,
    mask: torch.Tensor | None,
    codes: torch.Tensor | None,
    scale: torch.Tensor | None,
    factor: torch.Tensor,
    inverse: torch.Tensor,
    fmt: DenseFormat,
) -> None:
    """Sweep `values`, at first the weight, and fill the other results of `op.Swept`.

    Args:
        values: fp32 [out, in].
        mask: bool [out, in]; None to keep all.
        codes: int8 [out, in]; None at 16 bits.
        scale: bf16 [out, in/group]; None at 16 bits.
        factor: fp32 [in, in], upper triangular.
        inverse: fp32 [in], one over the factor's diagonal.
        fmt: the storage format.
    """
    for first in range(0, len(values), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        kept, rounded, steps = (None if t is None else t[rows] for t in (mask, codes, scale))
        _sweep_rows(values[rows], kept, rounded, steps, factor, inverse, fmt)


def _sweep_rows(
    values: torch.Tensor,
    mask: torch.Tensor | None,
    codes: torch.Tensor | None,
    scale: torch.Tensor | None,
    factor: torch.Tensor,
    inverse: torch.Tensor,
    fmt: DenseFormat,
) -> None:
    products = torch.empty_like(values)
    for column in range(values.shape[1]):
        number, place = divmod(column, fmt.group_size)
        one, later = slice(column, column + 1), slice(column + 1, None)
        if scale is not None and place == 0:
            group = slice(column, column + fmt.group_size)
            scale[:, number] = choose_scale(values[:, group], inverse[group], fmt)
        if mask is not None and column % GROUP == 0:
            four = slice(column, column + GROUP)
            mask[:, four] = keep_two(values[:, four] * inverse[four])
        value = values[:, one]
        if codes is None or scale is None:
            rounded = value.to(torch.bfloat16)
        else:
            step = scale[:, number : number + 1]
            code = integer.quantize(value, step, fmt.weight_bits)
            rounded = integer.dequantize(code, step)
            codes[:, one] = code if mask is None else code * mask[:, one]
        if mask is not None:
            rounded = torch.where(mask[:, one], rounded, 0.0)
        error = (value - rounded) * inverse[column]
        torch.mul(error, factor[column, later], out=products[:, later])
        values[:, later] -= products[:, later]


def choose_scale(values: torch.Tensor, inverse: torch.Tensor, fmt: DenseFormat) -> torch.Tensor:
    """Return the scale of each row of a group, bf16 [out].

    Args:
        values: the group's weights when the sweep reaches it, fp32 [out, group].
        inverse: fp32 [group].
        fmt: the storage format.
    """
    if fmt.is_sparse:
        values = torch.where(keep_two(values * inverse), values, 0.0)
    lowest, highest = integer.code_range(fmt.weight_bits)
    largest = values.abs().amax(dim=-1) / ((highest - lowest) / 2)

    def shrink(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a scale, and what rounding with it costs."""
        scale = (largest * (1 - number / 16)).to(torch.bfloat16)
        scale = torch.where(scale == 0, LEAST_SCALE, scale)
        codes = integer.quantize(values, scale[:, None], fmt.weight_bits)
        cost = (values - integer.dequantize(codes, scale[:, None])) * inverse
        return scale, _add_pairs(cost * cost)

    chosen, least = shrink(0)
    least = least * 0.5
    for number in range(1, TRIED):
        scale, cost = shrink(number)
        chosen = torch.where(cost < least, scale, chosen)
        least = torch.minimum(cost, least)
    return chosen


def keep_two(sizes: torch.Tensor) -> torch.Tensor:
    """Return which two of every four have the largest magnitude, bool; the first of equal ones."""
    fours = sizes.abs().unflatten(-1, (-1, GROUP))
    kept = fours.sort(dim=-1, descending=True, stable=True).indices[..., : GROUP // 2]
    return torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, kept, True).flatten(-2)


def _add_pairs(terms: torch.Tensor) -> torch.Tensor:
    """Return the sums of the last axis, a power of two, by adding adjacent pairs repeatedly."""
    while terms.shape[-1] > 1:
        terms = terms[..., 0::2] + terms[..., 1::2]
    return terms.squeeze(-1)
