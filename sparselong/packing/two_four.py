"""2:4 sparsity: of every four neighbouring weights two are kept, and 3 bits say which.

There are C(4, 2) = 6 ways to keep two of four, so a pattern takes 3 bits; eight patterns (32
weights) fill three bytes, the first pattern in the lowest bits. With the kept weights at half the
dense size this is 0.75 bit per weight of index, where two explicit 2-bit positions would take 1.
"""

from __future__ import annotations

import torch

GROUP = 4
BLOCK = 32
"""Weights per three bytes of packed patterns."""

PATTERNS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
"""Positions that each pattern number keeps."""


def is_two_four(kept: torch.Tensor) -> torch.Tensor:
    """bool [..., K] of kept (or nonzero) weights → bool [..., K/4]: at most two in the group."""
    return kept.reshape(*kept.shape[:-1], -1, GROUP).sum(dim=-1) <= 2


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """Mask with exactly two kept of every four → packed patterns.

    Args:
        mask: bool [..., K], K divisible by 32.

    Returns:
        uint8 [..., K/32·3].

    Raises:
        ValueError: K is not divisible by 32, or a group does not keep exactly two.
    """
    if mask.shape[-1] % BLOCK:
        raise ValueError(f"last dimension must be divisible by {BLOCK}, got {mask.shape[-1]}")
    groups = mask.reshape(*mask.shape[:-1], -1, GROUP)
    if not bool((groups.sum(dim=-1) == 2).all()):
        raise ValueError("mask must keep exactly two of every four weights")
    bits = (groups * torch.tensor([1, 2, 4, 8], device=mask.device)).sum(dim=-1)
    number = torch.zeros(16, dtype=torch.int32, device=mask.device)
    for index, (first, second) in enumerate(PATTERNS):
        number[(1 << first) | (1 << second)] = index
    patterns = number[bits].reshape(*mask.shape[:-1], -1, 8)
    shifts = torch.arange(0, 24, 3, device=mask.device)
    words = (patterns << shifts).sum(dim=-1, dtype=torch.int32)
    packed = (words.unsqueeze(-1) >> torch.tensor([0, 8, 16], device=mask.device)) & 0xFF
    return packed.to(torch.uint8).reshape(*mask.shape[:-1], -1)


def unpack_mask(packed: torch.Tensor) -> torch.Tensor:
    """Packed patterns uint8 [..., K/32·3] → bool mask [..., K].

    Raises:
        ValueError: the last dimension is not a multiple of 3, or holds pattern 6 or 7.
    """
    if packed.shape[-1] % 3:
        raise ValueError(f"last dimension must be divisible by 3, got {packed.shape[-1]}")
    triples = packed.to(torch.int32).reshape(*packed.shape[:-1], -1, 3)
    words = (triples << torch.tensor([0, 8, 16], device=packed.device)).sum(
        dim=-1, dtype=torch.int32
    )
    patterns = (words.unsqueeze(-1) >> torch.arange(0, 24, 3, device=packed.device)) & 0x7
    if bool((patterns >= len(PATTERNS)).any()):
        raise ValueError("packed mask holds a pattern above 5: the checkpoint is damaged")
    table = torch.zeros(len(PATTERNS), GROUP, dtype=torch.bool, device=packed.device)
    for index, positions in enumerate(PATTERNS):
        table[index, list(positions)] = True
    return table[patterns].reshape(*packed.shape[:-1], -1)


def gather_kept(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """values [..., K] where mask keeps exactly two of every four → [..., K/2], in order."""
    return values[mask].reshape(*values.shape[:-1], -1)


def scatter_kept(kept: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The inverse of `gather_kept`, zeros elsewhere: [..., K/2] → [..., K]."""
    values = torch.zeros(mask.shape, dtype=kept.dtype, device=kept.device)
    values[mask] = kept.reshape(-1)
    return values
