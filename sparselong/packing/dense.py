"""Storage of one dense projection: kept weights, the 2:4 mask and the scales.

| tensor          | when       | dtype, shape                                                   |
|-----------------|------------|----------------------------------------------------------------|
| `weight_packed` | always     | 4 bits: uint8 [out, kept/2]; 8: int8 [out, kept]; 16: bf16     |
| `weight_mask`   | 2:4        | uint8 [out, in/32·3], 3-bit patterns (see two_four.py)         |
| `weight_scale`  | 4 and 8    | bf16 [out, in/group]                                           |

`kept` is in/2 with 2:4 sparsity and in otherwise. 2:4 with 4 bits and groups of 64 takes
2 + 0.75 + 0.25 = 3.0 bits per weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from sparselong.packing import integer, two_four


@dataclass(frozen=True)
class DenseFormat:
    """Storage format of the shared dense layers."""

    weight_bits: Literal[4, 8, 16]
    sparsity: Literal["2:4", "none"]
    group_size: int

    @property
    def is_sparse(self) -> bool:
        """Whether two of every four weights are dropped."""
        return self.sparsity == "2:4"

    @property
    def is_quantized(self) -> bool:
        """Whether weights are stored as integer codes with scales."""
        return self.weight_bits < 16

    @property
    def is_packed(self) -> bool:
        """Whether weights are stored otherwise than as plain bf16."""
        return self.is_sparse or self.is_quantized

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per dense weight, including mask and scales."""
        kept = 0.5 if self.is_sparse else 1.0
        index = 0.75 if self.is_sparse else 0.0
        scale = 16 / self.group_size if self.is_quantized else 0.0
        return kept * self.weight_bits + index + scale

    def check(self, name: str, in_features: int) -> None:
        """Raise ValueError if a weight with `in_features` inputs does not fit this format."""
        if self.is_sparse and in_features % two_four.BLOCK:
            raise ValueError(f"{name}: 2:4 requires in_features divisible by 32, got {in_features}")
        if self.is_quantized and in_features % self.group_size:
            raise ValueError(
                f"{name}: in_features {in_features} is not divisible by the group size "
                f"{self.group_size}"
            )

    def empty(self, out_features: int, in_features: int) -> dict[str, torch.Tensor]:
        """Return uninitialized tensors with the stored names, dtypes and shapes."""
        kept = in_features // 2 if self.is_sparse else in_features
        dtype, width = {
            4: (torch.uint8, kept // 2),
            8: (torch.int8, kept),
            16: (torch.bfloat16, kept),
        }[self.weight_bits]
        tensors = {"weight_packed": torch.empty(out_features, width, dtype=dtype)}
        if self.is_sparse:
            tensors["weight_mask"] = torch.empty(
                out_features, in_features // 32 * 3, dtype=torch.uint8
            )
        if self.is_quantized:
            tensors["weight_scale"] = torch.empty(
                out_features, in_features // self.group_size, dtype=torch.bfloat16
            )
        return tensors


def pack(
    fmt: DenseFormat,
    values: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Return the stored tensors of a weight's codes (bf16 values at 16 bits).

    Args:
        fmt: the storage format.
        values: int8 codes or bf16 values [out, in]; those that the mask drops are ignored.
        mask: bool [out, in], True for exactly two of every four; required for 2:4 only.
        scale: bf16 [out, in/group]; required for 4 and 8 bits only.
    """
    kept = values
    tensors: dict[str, torch.Tensor] = {}
    if fmt.is_sparse:
        if mask is None:
            raise ValueError("2:4 requires a mask")
        kept = two_four.gather_kept(values, mask)
        tensors["weight_mask"] = two_four.pack_mask(mask)
    if fmt.is_quantized:
        if scale is None or scale.dtype != torch.bfloat16:
            raise ValueError("quantized weights require bf16 scales")
        tensors["weight_scale"] = scale.contiguous()
    packed = integer.pack_nibbles(kept) if fmt.weight_bits == 4 else kept
    return {"weight_packed": packed.contiguous(), **tensors}


def unpack_mask(fmt: DenseFormat, tensors: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Return the bool mask [out, in], or None if the format is not sparse."""
    return two_four.unpack_mask(tensors["weight_mask"]) if fmt.is_sparse else None


def unpack_values(fmt: DenseFormat, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return int8 codes (bf16 values at 16 bits) [out, in], with zeros where dropped."""
    kept = tensors["weight_packed"]
    if fmt.weight_bits == 4:
        kept = integer.unpack_nibbles(kept)
    mask = unpack_mask(fmt, tensors)
    return kept if mask is None else two_four.scatter_kept(kept, mask)


def unpack(fmt: DenseFormat, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the bf16 weight [out, in] that the stored tensors represent."""
    values = unpack_values(fmt, tensors)
    return integer.dequantize(values, tensors["weight_scale"]) if fmt.is_quantized else values
