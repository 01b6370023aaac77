"""Cross-entropy over a vocabulary of which this process holds only some columns.

The maths, for a row of logits z that is split into shards, with label y:

    m_s = max of the shard      t_s = sum of exp(z - m_s) over the shard      c_s = z_y, or -inf
    m = max_s m_s               t = sum_s t_s exp(m_s - m)                    c = max_s c_s
    loss = m - c + log(t)       dz = exp(z - m) / t - e_y

`shard_statistics` computes (m_s, t_s, c_s) of a shard's logits. The caller exchanges them;
`combine_statistics` adds them in the shards' order, so that all processes get the same bits; and
`turn_into_shard_gradients` overwrites the shard's logits. They are read twice and written once, as
by `cross_entropy.py` for a whole vocabulary. All sums are fp32 (fp64 from fp64). The normalizer is
kept as m and t, because rounding their log-sum-exp alone would cost one or two ulps.

On a CPU torch replaces the kernels. The code is ours, under this repository's licence.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from sparselong.kernels.launch import launch

HIGHEST, TOTAL, CHOSEN = range(3)
_LAUNCH = {"BLOCK": 4096, "num_warps": 8}


def shard_statistics(logits: torch.Tensor, targets: torch.Tensor, first: int) -> torch.Tensor:
    """Return each row's maximum, sum of exp(logit - maximum), and target's logit in this shard.

    Args:
        logits: [rows, columns], contiguous; columns may be 0.
        targets: int64 [rows], over the whole vocabulary.
        first: the vocabulary's index of the first column.

    Returns:
        [rows, 3], fp32 (fp64 from fp64); a target that is not in the shard has logit -inf.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    found = torch.empty(len(logits), 3, dtype=wide, device=logits.device)
    columns = logits.shape[1]
    if logits.is_cuda and len(logits):
        launch(
            _kernels().statistics_kernel,
            (len(logits),),
            logits,
            targets,
            found,
            columns,
            first,
            **_LAUNCH,
        )
    elif columns:
        values = logits.to(wide)
        torch.amax(values, 1, out=found[:, HIGHEST])
        torch.sum(torch.exp(values - found[:, HIGHEST, None]), 1, out=found[:, TOTAL])
        column, is_held = _own_columns(targets, first, columns)
        chosen = values.gather(1, column[:, None])[:, 0]
        found[:, CHOSEN] = chosen.where(is_held, -torch.inf)
    else:
        found[:] = found.new_tensor([-torch.inf, 0.0, -torch.inf])
    return found


def combine_statistics(parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine the statistics of all shards, [shards, rows, 3], in their order.

    Returns:
        (losses [rows], normalizers [rows, 2]: the maximum, and the sum of exp(logit - maximum)).
    """
    highest = parts[..., HIGHEST].amax(0)
    scaled = parts[..., TOTAL] * torch.exp(parts[..., HIGHEST] - highest)
    total = scaled[0]
    for part in scaled[1:]:
        total = total + part
    losses = highest - parts[..., CHOSEN].amax(0) + total.log()
    return losses, torch.stack([highest, total], 1)


def turn_into_shard_gradients(
    logits: torch.Tensor, targets: torch.Tensor, first: int, normalizers: torch.Tensor
) -> None:
    """Replace this shard's logits by softmax - e_target over the whole vocabulary.

    Args:
        logits: [rows, columns], contiguous, overwritten.
        targets: int64 [rows], over the whole vocabulary.
        first: the vocabulary's index of the first column.
        normalizers: [rows, 2], from `combine_statistics`.
    """
    rows, columns = logits.shape
    if not logits.numel():
        return
    if logits.is_cuda:
        grid = (rows, -(-columns // _LAUNCH["BLOCK"]))
        launch(
            _kernels().gradient_kernel,
            grid,
            *(logits, targets, normalizers, columns, first),
            **_LAUNCH,
        )
        return
    highest, total = normalizers[:, :1], normalizers[:, 1:]
    gradient = torch.exp(logits.to(normalizers.dtype) - highest) / total
    column, is_held = _own_columns(targets, first, columns)
    gradient[torch.arange(rows), column] -= is_held.to(gradient.dtype)
    logits.copy_(gradient)


def _own_columns(
    targets: torch.Tensor, first: int, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (the targets' columns in the shard, 0 if not held; whether they are held)."""
    column = targets - first
    is_held = (column >= 0) & (column < columns)
    return column.where(is_held, 0), is_held


@functools.cache
def _kernels() -> Any:
    """Return the kernels' module, imported on first use because a CPU does not need Triton."""
    from sparselong.kernels.layer import cross_entropy_shard_triton as shard_kernels

    return shard_kernels
