"""What `kernels/decode/gemv.py` computes, in plain torch: the weight unpacked, then multiplied."""

from __future__ import annotations

import torch

from sparselong.packing import dense
from sparselong.packing.dense import DenseFormat


def packed_gemv_reference(
    x: torch.Tensor,
    fmt: DenseFormat,
    tensors: dict[str, torch.Tensor],
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """[rows, in] → [rows, out] in fp64."""
    out = x.double() @ dense.unpack(fmt, tensors).double().T
    return out if bias is None else out + bias.double()
