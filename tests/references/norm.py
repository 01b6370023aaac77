"""RMSNorm, and residual addition with RMSNorm, by definition in fp64.

autograd computes the gradients. Shares no code with the package.
"""

from __future__ import annotations

import torch


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x divided by its root mean square, times the weight: fp64 [..., hidden]."""
    x, weight = x.double(), weight.double()
    mean_square = (x * x).sum(-1, keepdim=True) / x.shape[-1]
    return weight * x / (mean_square + eps) ** 0.5


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the norm of the sum, and the sum, both unrounded: fp64 [..., hidden]."""
    total = x.double() + residual.double()
    return rms_norm_reference(total, weight, eps), total
