"""Reference for linear layer and cross-entropy: plain torch, all logits at once."""

from __future__ import annotations

import torch
from torch.nn import functional


def linear_cross_entropy_reference(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Return the loss summed over rows with a label other than -100, in fp32 or fp64.

    Args:
        hidden: [rows, width]; fp64 input gives fp64 losses.
        weight: [vocab, width].
        labels: int64 [rows].
    """
    logits = functional.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(logits, labels, reduction="sum")
