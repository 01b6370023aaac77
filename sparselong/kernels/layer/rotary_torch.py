"""Rotary embedding in plain torch, differentiable: the CPU backend."""

from __future__ import annotations

import torch


def rotate_torch(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q and k rotated in their dtype, as transformers does; shapes as in `rotary.rotate`."""
    cos, sin = cos[:, None], sin[:, None]

    def turn(x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, -1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)

    return turn(q), turn(k)
