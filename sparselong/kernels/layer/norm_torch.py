"""RMSNorm, and residual + RMSNorm, in plain torch, differentiable: the CPU backend."""

from __future__ import annotations

import torch


def rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """gpt-oss's RMSNorm: statistics and the product with the weight in fp32, then one rounding.

    Args:
        x: [..., hidden]; fp64 stays fp64 throughout.
        weight: [hidden].
        eps: added to the mean square.

    Returns:
        [..., hidden] in x's dtype.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * normed).to(x.dtype)


def add_rms_norm_torch(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (norm of the sum, the sum) for `residual + x`, which is rounded to its dtype first."""
    total = residual + x
    return rms_norm_torch(total, weight, eps), total
