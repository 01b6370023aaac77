"""Attention with sinks by definition, in fp64: one head of one sequence at a time.

autograd computes the gradients. Shares no code with the package.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor,
    *,
    boundaries: Sequence[int] | None = None,
    window: int | None = None,
    scale: float | None = None,
    offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and log-sum-exp (including the sink) of every query.

    A query at position p sees the key at j if j <= p, p - j < window, and both are in the same
    document. Its weights are exp(score) over the sum of exp(score) of its keys and exp(sink).

    Args:
        q: [batch, heads, queries, head_dim]; query i has position offset + i.
        k: [batch, kv_heads, keys, head_dim]; consecutive heads share one KV head.
        v: same shape as k.
        sinks: [heads].
        boundaries: document starts on the flattened [batch, keys] axis, and its end.
        scale: factor of the scores; 1 / sqrt(head_dim) if None.

    Returns:
        fp64 [batch, heads, queries, head_dim] and [batch, heads, queries].
    """
    q, k, v, sinks = (tensor.double() for tensor in (q, k, v, sinks))
    batch, heads, queries, head_dim = q.shape
    keys, group = k.shape[2], heads // k.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    position = torch.arange(offset, offset + queries, device=q.device)[:, None]
    key = torch.arange(keys, device=q.device)[None, :]
    outputs, sums = [], []
    for row in range(batch):
        visible = key <= position
        if window is not None:
            visible = visible & (position - key < window)
        if boundaries is not None:
            document = torch.zeros(keys, dtype=torch.int64, device=q.device)
            for boundary in boundaries:  # count the boundaries at or before each key
                document += torch.arange(row * keys, (row + 1) * keys, device=q.device) >= boundary
            visible = visible & (document[position] == document[None, :])
        for head in range(heads):
            scores = scale * q[row, head] @ k[row, head // group].T
            scores = torch.where(visible, scores, float("-inf"))
            largest = torch.maximum(scores.amax(1), sinks[head]).detach()
            weights = torch.exp(scores - largest[:, None])
            total = weights.sum(1) + torch.exp(sinks[head] - largest)
            outputs.append(weights @ v[row, head // group] / total[:, None])
            sums.append(largest + torch.log(total))
    return torch.stack(outputs).view(q.shape), torch.stack(sums).view(batch, heads, queries)
