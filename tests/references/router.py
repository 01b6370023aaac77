"""gpt-oss's router as its formula says, in the dtype of its arguments."""

from __future__ import annotations

import torch


def route_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x, the chosen experts' weights and their indices; of equal logits the first is taken.

    Args:
        x: [tokens, hidden].
        weight: [experts, hidden].
        bias: [experts].
        top_k: experts per token.
    """
    logits = x @ weight.T + bias
    ordered, indices = torch.sort(logits, dim=1, descending=True, stable=True)
    return x, ordered[:, :top_k].softmax(1), indices[:, :top_k]
