"""2:4 sparsity: two of every four consecutive weights are kept, and 3 bits record which two.

Two of four can be kept in C(4, 2) = 6 ways, so a pattern takes 3 bits. Eight patterns (32 weights)
fill three bytes, with the first pattern in the lowest bits. The patterns add 0.75 bit per dense
weight, where two explicit 2-bit positions would add 1 bit.
"""

from __future__ import annotations

import torch

GROUP = 4
BLOCK = 32
"""Number of weights whose patterns fill three bytes."""

PATTERNS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
"""Positions kept by each pattern number."""


def is_two_four(kept: torch.Tensor) -> torch.Tensor:
    """Return whether each group of four in bool [..., K] keeps at most two: bool [..., K/4]."""
    return kept.reshape(*kept.shape[:-1], -1, GROUP).sum(dim=-1) <= 2


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """Pack a mask that keeps exactly two of every four weights.

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
    """Unpack patterns uint8 [..., K/32·3] into a bool mask [..., K].

    Raises:
        ValueError: the last dimension is not divisible by 3, or a pattern is 6 or 7.
    """
    if packed.shape[-1] % 3:
        raise ValueError(f"last dimension must be divisible by 3, got {packed.shape[-1]}")
    triples = packed.to(torch.int32).reshape(*packed.shape[:-1], -1, 3)
    words = (triples << torch.tensor([0, 8, 16], device=packed.device)).sum(
        dim=-1, dtype=torch.int32
    )
    patterns = (words.unsqueeze(-1) >> torch.arange(0, 24, 3, device=packed.device)) & 0x7
    if bool((patterns >= len(PATTERNS)).any()):
        raise ValueError("packed mask contains a pattern above 5: the checkpoint is damaged")
    table = torch.zeros(len(PATTERNS), GROUP, dtype=torch.bool, device=packed.device)
    table.scatter_(1, torch.tensor(PATTERNS, device=packed.device), True)
    return table.index_select(0, patterns.flatten()).reshape(*packed.shape[:-1], -1)


def gather_kept(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return, in order, the values [..., K/2] of [..., K] for which the mask is True."""
    return values[mask].reshape(*values.shape[:-1], -1)


def scatter_kept(kept: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return [..., K] with kept [..., K/2] where the mask is True and zeros elsewhere."""
    values = torch.zeros(mask.shape, dtype=kept.dtype, device=kept.device)
    values[mask] = kept.reshape(-1)
    return values
