"""Kullback-Leibler divergence of a model from a reference, over a vocabulary that may be sharded.

The maths, for rows of logits p (the reference's) and q (the model's) that are split into shards:

    a_s = max of p      t_s = sum of exp(p - a_s)      d_s = sum of exp(p - a_s) (p - q)
    b_s = max of q      u_s = sum of exp(q - b_s)
    a = max a_s         t = sum_s t_s exp(a_s - a)     d = sum_s d_s exp(a_s - a)     b, u alike
    KL(p || q) = d / t - (a + log t) + (b + log u)     in nats, 0 for equal logits

All sums are fp32 (fp64 from fp64), those over shards in the shards' order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

COMPARED_ROWS = 32
"""Rows of each rank whose logits exist at once: a sixteenth as many as in the loss, which has one
copy of a row's logits in their own dtype. Here there are two, and four more in fp32."""


class Divergence(NamedTuple):
    """How far a model's next token is from the reference's, row by row.

    Attributes:
        nats: fp32 [rows] (fp64 from fp64), the divergence.
        agrees: bool [rows], whether both have the same most likely token.
    """

    nats: torch.Tensor
    agrees: torch.Tensor


def shard_divergence(
    reference: torch.Tensor, logits: torch.Tensor, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's statistics in this shard.

    Args:
        reference: [rows, columns], the reference's logits; columns may be 0.
        logits: the same of the model.
        first: the vocabulary's index of the first column.

    Returns:
        ([rows, 5]: a, t, d, b, u, fp32 or fp64; int64 [rows, 2]: both most likely tokens).
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    if not logits.shape[1]:
        low = torch.tensor([-torch.inf, 0, 0, -torch.inf, 0], dtype=wide, device=logits.device)
        best = torch.zeros(len(logits), 2, dtype=torch.int64, device=logits.device)
        return low.expand(len(logits), 5).contiguous(), best
    found, best = [], []
    p, q = reference.to(wide), logits.to(wide)
    for values in (p, q):
        highest, token = values.max(1)
        weights = torch.exp(values - highest[:, None])
        found += [highest, weights.sum(1)]
        if values is p:
            found.append(weights.mul_(p - q).sum(1))
        del weights
        best.append(token + first)
    return torch.stack(found, 1), torch.stack(best, 1)


def combine_divergence(parts: torch.Tensor, best: torch.Tensor) -> Divergence:
    """Combine the statistics of all shards, [shards, rows, 5] and [shards, rows, 2], in order."""
    highest = parts[..., [0, 3]].amax(0)  # of p and of q
    scales = torch.exp(parts[..., [0, 3]] - highest)
    sums = torch.zeros_like(parts[0, :, :3])  # t, d, u
    for part, scale in zip(parts, scales, strict=True):
        sums = sums + part[:, [1, 2, 4]] * scale[:, [0, 0, 1]]
    total, weighted, other = sums.unbind(1)
    nats = weighted / total - (highest[:, 0] + total.log()) + (highest[:, 1] + other.log())
    # Of shards with equal maxima the first, which holds the first of these tokens.
    winners = parts[..., [0, 3]].argmax(0)
    tokens = best.gather(0, winners[None])[0]
    return Divergence(nats.clamp_(min=0), tokens[:, 0] == tokens[:, 1])
