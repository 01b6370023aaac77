"""How one dense projection is stored: kept weights, the 2:4 mask, the scales.

| tensor          | when       | dtype, shape                                                   |
|-----------------|------------|----------------------------------------------------------------|
| `weight_packed` | always     | 4 bits: uint8 [out, kept/2]; 8: int8 [out, kept]; 16: bf16     |
| `weight_mask`   | 2:4        | uint8 [out, in/32·3], 3-bit patterns (see two_four.py)         |
| `weight_scale`  | 4 and 8    | bf16 [out, in/group]                                           |

`kept` is in/2 with 2:4 and in without. 2:4 with 4 bits and groups of 64 takes
2 + 0.75 + 0.25 = 3.0 bits per weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from sparselong.packing import integer, two_four


@dataclass(frozen=True)
class DenseFormat:
    """The storage of the shared dense layers."""

    weight_bits: Literal[4, 8, 16]
    sparsity: Literal["2:4", "none"]
    group_size: int

    @property
    def is_sparse(self) -> bool:
        """Whether two of every four weights are dropped."""
        return self.sparsity == "2:4"

    @property
    def is_quantized(self) -> bool:
        """Whether weights are integer codes with scales."""
        return self.weight_bits < 16

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the dense shape, everything included."""
        kept = 0.5 if self.is_sparse else 1.0
        index = 0.75 if self.is_sparse else 0.0
        scale = 16 / self.group_size if self.is_quantized else 0.0
        return kept * self.weight_bits + index + scale

    def check(self, name: str, in_features: int) -> None:
        """Raises ValueError when a weight with that many inputs cannot be stored so."""
        if self.is_sparse and in_features % two_four.BLOCK:
            raise ValueError(f"{name}: 2:4 needs in_features divisible by 32, got {in_features}")
        if self.is_quantized and in_features % self.group_size:
            raise ValueError(
                f"{name}: in_features {in_features} is not divisible by the group size "
                f"{self.group_size}"
            )

    def empty(self, out_features: int, in_features: int) -> dict[str, torch.Tensor]:
        """Uninitialized tensors of the right names, dtypes and shapes, on the default device."""
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
    """Codes (or bf16 values when 16 bits) and mask → the stored tensors.

    Args:
        values: int8 codes or bf16 values [out, in]; what the mask drops is not looked at.
        mask: bool [out, in], exactly two of four, with 2:4 only.
        scale: bf16 [out, in/group], with 4 and 8 bits only.
    """
    kept = values
    tensors: dict[str, torch.Tensor] = {}
    if fmt.is_sparse:
        if mask is None:
            raise ValueError("2:4 needs a mask")
        kept = two_four.gather_kept(values, mask)
        tensors["weight_mask"] = two_four.pack_mask(mask)
    if fmt.is_quantized:
        if scale is None or scale.dtype != torch.bfloat16:
            raise ValueError("quantized weights need bf16 scales")
        tensors["weight_scale"] = scale.contiguous()
    packed = integer.pack_nibbles(kept) if fmt.weight_bits == 4 else kept
    return {"weight_packed": packed.contiguous(), **tensors}


def unpack_mask(fmt: DenseFormat, tensors: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """The bool mask [out, in] with 2:4, None without."""
    return two_four.unpack_mask(tensors["weight_mask"]) if fmt.is_sparse else None


def unpack_values(fmt: DenseFormat, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Stored tensors → int8 codes (bf16 values when 16 bits) [out, in], zeros where dropped."""
    kept = tensors["weight_packed"]
    if fmt.weight_bits == 4:
        kept = integer.unpack_nibbles(kept)
    mask = unpack_mask(fmt, tensors)
    return kept if mask is None else two_four.scatter_kept(kept, mask)


def unpack(fmt: DenseFormat, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Stored tensors → the bf16 weight [out, in] that they mean."""
    values = unpack_values(fmt, tensors)
    return integer.dequantize(values, tensors["weight_scale"]) if fmt.is_quantized else values
