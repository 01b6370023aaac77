"""Linear layer and cross-entropy in plain torch, every logit at once: what tests trust."""

from __future__ import annotations

import torch
from torch.nn import functional


def linear_cross_entropy_reference(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Sum of the losses of the rows whose label is not -100, in fp32 (fp64 from fp64).

    Args:
        hidden: [rows, width]; weight: [vocab, width]; labels: int64 [rows].
    """
    logits = functional.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(logits, labels, reduction="sum")
