"""fp64 reference for `kernels/decode/gemv.py`: unpacks the weight by definition and multiplies.
Shares no code with the package."""

from __future__ import annotations

from typing import Any

import torch

from tests.references.two_four import kept_reference


def packed_gemv_reference(
    x: torch.Tensor,
    fmt: Any,
    tensors: dict[str, torch.Tensor],
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Map [rows, in] to fp64 [rows, out]; `fmt` is a DenseFormat (weight_bits and sparsity)."""
    out = x.double() @ _unpack(fmt.weight_bits, fmt.sparsity == "2:4", tensors).T
    return out if bias is None else out + bias.double()


def _unpack(bits: int, is_sparse: bool, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return fp64 [out, in]: codes times their group's scale, rounded to bf16."""
    values = tensors["weight_packed"]
    if bits == 4:  # two codes per byte, low nibble first, from -8 to 7
        nibbles = torch.stack((values % 16, values // 16), -1).flatten(1).long()
        values = nibbles - 16 * (nibbles >= 8)
    weight = values.double()
    if is_sparse:
        kept = kept_reference(tensors["weight_mask"])
        dense = torch.zeros(kept.shape, dtype=torch.float64, device=kept.device)
        dense[kept] = weight.flatten()
        weight = dense
    if bits == 16:
        return weight
    scale = tensors["weight_scale"].double()
    weight = weight * scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    return weight.bfloat16().double()
