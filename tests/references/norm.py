"""RMSNorm, and a residual sum with its RMSNorm, by their definition in fp64.

Gradients are torch's own. Shares no code with the package.
"""

from __future__ import annotations

import torch


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x over the root of its mean square, times the weight: fp64 [..., hidden]."""
    x, weight = x.double(), weight.double()
    mean_square = (x * x).sum(-1, keepdim=True) / x.shape[-1]
    return weight * x / (mean_square + eps) ** 0.5


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of the sum, and the sum, neither rounded: fp64 [..., hidden]."""
    total = x.double() + residual.double()
    return rms_norm_reference(total, weight, eps), total
