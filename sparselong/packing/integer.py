"""Symmetric integer weights with one bf16 scale per group of input weights.

`dequantize` defines the value of a stored code for storage, training and export:
bf16(code · scale), with the product taken in fp32. Any other implementation must return the same
bits.
"""

from __future__ import annotations

import torch


def code_range(bits: int) -> tuple[int, int]:
    """Return the smallest and the largest code: (−8, 7) for 4 bits, (−128, 127) for 8."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def quantize(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Round to the nearest code, with ties to even and saturation.

    Args:
        weight: [out, in], converted to fp32.
        scale: bf16 or fp32 [out, in/group]; the group size follows from the shapes.
        bits: 4 or 8.

    Returns:
        int8 codes [out, in]; 0 where the scale is 0.
    """
    lowest, highest = code_range(bits)
    step = scale.float().unsqueeze(-1)
    ratio = torch.where(step == 0, 0.0, weight.float().reshape(*scale.shape, -1) / step)
    codes = torch.round(ratio).clamp(lowest, highest)
    return codes.reshape(weight.shape).to(torch.int8)


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return bf16(code · scale) [out, in] for int8 codes [out, in], scale [out, in/group]."""
    grouped = codes.float().reshape(*scale.shape, -1)
    return (grouped * scale.float().unsqueeze(-1)).reshape(codes.shape).to(torch.bfloat16)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Pack int8 codes −8…7 [..., K] into uint8 [..., K/2], two's complement, low nibble first.

    Raises:
        ValueError: K is odd.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"last dimension must be even, got {codes.shape[-1]}")
    nibbles = codes.to(torch.uint8) & 0x0F
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Unpack uint8 [..., K/2] into int8 codes [..., K]; the inverse of `pack_nibbles`."""
    nibbles = torch.stack((packed & 0x0F, packed >> 4), dim=-1).to(torch.int8)
    return torch.where(nibbles > 7, nibbles - 16, nibbles).reshape(*packed.shape[:-1], -1)
