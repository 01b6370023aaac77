"""One sweep over a weight's columns: choose the 2:4 mask, round, pass both errors on to the right.

    for every four columns:   keep the two largest |w_j| / U_jj of each row        (SparseGPT)
        for each of them:     q = bf16(code · scale) if kept, otherwise 0          (GPTQ)
                              e_j = (w_j − q) / U_jj
                              w_k −= e_j · U_jk   for every later column k

U is the upper Cholesky factor of the inverse Hessian. The error of a column holds what rounding
changed in a kept weight, and the whole of a pruned one. The columns that receive it have not been
pruned yet, so all of them may compensate it, and the mask is chosen from the weights that did. Two
sweeps, one for the mask and one for the codes, must leave pruned columns out of the second.

A group's scale is chosen when the sweep reaches the group, from the weights of that moment that the
same rule would keep: their largest magnitude over half the range of the codes, in bf16. A smaller
scale, at which the largest weights saturate, is taken only if it halves the group's squared errors,
each over U_jj²: then a large weight of a column that matters little would have left few codes for
the others. Smaller gains do not carry over to other inputs than those of the calibration.

On a GPU one Triton kernel does the whole sweep (`triton_sweep.py`), on a CPU plain torch
(`torch_sweep.py`). Both take products, differences and quotients in the same order, each rounded to
fp32, so they return the same bits for the same arguments: nothing depends on how a library orders
its sums. There is no matrix product for the same reason. Sources: Frantar and Alistarh, SparseGPT
(2023), and Frantar et al., GPTQ (2022). The code is ours, under this repository's licence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sparselong.kernels.sweep import torch_sweep
from sparselong.kernels.sweep.triton_sweep import launch_sweep
from sparselong.packing import DenseFormat


class Swept(NamedTuple):
    """A pruned and rounded weight.

    Attributes:
        values: fp32 [out, in], each weight just before it was pruned or rounded.
        mask: bool [out, in], two of every four; None if the format keeps all.
        codes: int8 [out, in], 0 where pruned; None at 16 bits, where `values` round to bf16.
        scale: bf16 [out, in/group]; None at 16 bits.
    """

    values: torch.Tensor
    mask: torch.Tensor | None
    codes: torch.Tensor | None
    scale: torch.Tensor | None


def sweep_columns(weight: torch.Tensor, factor: torch.Tensor, fmt: DenseFormat) -> Swept:
    """Prune and round a weight for the format.

    Args:
        weight: fp32 [out, in], contiguous, fewer than 2^31 elements; not changed.
        factor: upper Cholesky factor of the inverse Hessian, fp32 [in, in], contiguous.
        fmt: 2:4 or dense; at 16 bits weights round to bf16.

    Raises:
        ValueError: a tensor does not fit, or the format cannot store this width.
    """
    _check(weight, factor, fmt)
    rows, columns = weight.shape
    values, inverse = weight.clone(), 1.0 / factor.diagonal()
    kept = torch.empty_like(weight, dtype=torch.bool) if fmt.is_sparse else None
    codes = scale = None
    if fmt.is_quantized:
        codes = torch.empty_like(weight, dtype=torch.int8)
        groups = columns // fmt.group_size
        scale = torch.empty(rows, groups, dtype=torch.bfloat16, device=weight.device)
    swept = Swept(values, kept, codes, scale)
    sweep = launch_sweep if weight.is_cuda else torch_sweep.sweep
    sweep(*swept, factor, inverse, fmt)
    return swept


def _check(weight: torch.Tensor, factor: torch.Tensor, fmt: DenseFormat) -> None:
    columns = weight.shape[-1]
    for name, tensor, shape in (
        ("weight", weight, [len(weight), columns]),
        ("factor", factor, [columns, columns]),
    ):
        if list(tensor.shape) != shape:
            raise ValueError(f"{name}: shape {list(tensor.shape)}; allowed: {shape}")
        if tensor.dtype != torch.float32 or tensor.device != weight.device:
            raise ValueError(
                f"{name}: {tensor.dtype} on {tensor.device}; allowed: torch.float32 on "
                f"{weight.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: strides {list(tensor.stride())}; allowed: contiguous")
    fmt.check("weight", columns)
