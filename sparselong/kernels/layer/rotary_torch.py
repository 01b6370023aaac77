"""Rotary embedding in plain torch, differentiable: what a CPU runs."""

from __future__ import annotations

import torch


def rotate_torch(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes as in `rotary.rotate`; computed in the inputs' dtype, as transformers does."""
    cos, sin = cos[:, None], sin[:, None]

    def turn(x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, -1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)

    return turn(q), turn(k)
