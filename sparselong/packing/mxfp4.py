"""MXFP4: E2M1 values in blocks of 32 that share one power of two (OCP Microscaling Formats v1.0).

A code has a sign bit, two exponent bits and one mantissa bit. Its values are 0, ½, 1, 1½, 2, 3, 4,
6 and their negatives. A byte holds two codes, the first in its low nibble, as in openai/gpt-oss.
The scale byte is E8M0: 2^(byte − 127); byte 255 means NaN and is rejected.

Decoding needs no table: moving the sign to bit 15 and the three magnitude bits to bits 6–8 of a
bfloat16 gives the value times 2^−126 (subnormals included), so multiplying by 2^126 and then by the
scale is exact. The kernels do that; this module uses a 16-entry table because it is easier to read.
"""

from __future__ import annotations

import torch

BLOCK = 32
"""Number of weights that share one scale."""

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Value of each 4-bit code."""

NAN_SCALE = 255
"""Scale byte that means NaN."""


def unpack_codes(blocks: torch.Tensor) -> torch.Tensor:
    """Unpack uint8 [..., G, 16] into uint8 codes 0–15 [..., G·32], low nibble first."""
    codes = torch.stack((blocks & 0x0F, blocks >> 4), dim=-1)
    return codes.reshape(*blocks.shape[:-2], -1)


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """Pack uint8 codes 0–15 [..., K] into uint8 [..., K/32, 16]; inverse of `unpack_codes`."""
    pairs = codes.reshape(*codes.shape[:-1], -1, BLOCK // 2, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def decode(
    blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Return the exact values of a packed weight.

    Args:
        blocks: uint8 [..., K/32, 16].
        scales: uint8 [..., K/32], biased by 127.
        dtype: bfloat16 or wider. Values below 2^−133 are rounded to the dtype; published
            checkpoints contain none.

    Returns:
        [..., K] in `dtype`.

    Raises:
        ValueError: the shapes do not match, or a scale is NaN (byte 255).
    """
    if blocks.shape[:-1] != scales.shape or blocks.shape[-1] != BLOCK // 2:
        raise ValueError(
            f"blocks must be [..., K/32, 16] and scales [..., K/32], "
            f"got {tuple(blocks.shape)} and {tuple(scales.shape)}"
        )
    if bool((scales == NAN_SCALE).any()):
        raise ValueError("scales contain 255, which is NaN in E8M0: the checkpoint is damaged")
    table = torch.tensor(VALUES, dtype=torch.float32, device=blocks.device)
    codes = unpack_codes(blocks)
    values = table.index_select(0, codes.flatten().int()).reshape(*scales.shape, BLOCK)
    scaled = values * _powers_of_two(scales.to(torch.int32) - 127)
    return scaled.reshape(codes.shape).to(dtype)


def _powers_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """Return 2^exponent as fp32 [..., 1]; `ldexp` of every weight is much slower on a CPU."""
    ones = torch.ones(exponents.shape, dtype=torch.float32, device=exponents.device)
    return torch.ldexp(ones, exponents).unsqueeze(-1)


def encode(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round values to the nearest packed weight, with ties to the even code.

    The scale follows the OCP specification: 2^(⌊log2 max⌋ − 2). The largest magnitude of a block
    therefore falls in [4, 8) and saturates at 6.

    Args:
        weight: [..., K] of any float dtype, K divisible by 32.

    Returns:
        blocks uint8 [..., K/32, 16] and scales uint8 [..., K/32].

    Raises:
        ValueError: K is not divisible by 32, or a value is not finite.
    """
    if weight.shape[-1] % BLOCK:
        raise ValueError(f"last dimension must be divisible by {BLOCK}, got {weight.shape[-1]}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight contains NaN or infinity, which MXFP4 cannot store")
    grouped = weight.float().reshape(*weight.shape[:-1], -1, BLOCK)
    largest = grouped.abs().amax(dim=-1)
    exponent = torch.frexp(largest).exponent - 1 - 2  # frexp's mantissa lies in [½, 1)
    exponent = torch.where(largest == 0, -127, exponent).clamp(-127, 127)
    scales = (exponent + 127).to(torch.uint8)
    return encode_at(weight, scales), scales


def encode_at(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Round values to the nearest codes under given scales, ties to even, saturating at 6.

    Args:
        weight: finite [..., K] of any float dtype.
        scales: uint8 [..., K/32], none equal to 255.

    Returns:
        blocks uint8 [..., K/32, 16].
    """
    grouped = weight.float().reshape(*scales.shape, BLOCK)
    exponent = scales.to(torch.int32) - 127
    scaled = (grouped * _powers_of_two(-exponent)).clamp(-6.0, 6.0)
    # The step between adjacent codes is ½ below 2, 1 up to 4 and 2 up to 6. torch.round breaks ties
    # to even, and in each range an even multiple of the step is an even code.
    magnitude = scaled.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    rounded = torch.round(magnitude / step) * step
    table = torch.tensor(VALUES[:8], dtype=torch.float32, device=weight.device)
    codes = torch.bucketize(rounded, table).to(torch.uint8)
    codes = codes | (torch.signbit(scaled).to(torch.uint8) << 3)
    return pack_codes(codes.reshape(weight.shape))
