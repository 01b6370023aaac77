"""Mask and scale updates during training: which two of every four weights are kept.

Stage 02 removed two weights of every four: not the two smallest, but the two whose loss the
remaining ones could best compensate. The remaining weights were corrected accordingly; the removed
ones kept their old values in the masters. Selecting masks by magnitude right afterwards would undo
part of that selection before anything is learned: in the small demo model it flips 14 % of the bits
and restores weights that the correction already compensates.

The default criterion, *hysteresis*, therefore measures the change since stage 02. The two highest
scores of four are kept, where a weight's score is |weight| minus two handicaps:

    h  if stage 02 removed it:  max(0, largest |master| removed − smallest |master| kept),
       which measures how far magnitude disagrees with stage 02 in this group of four
    m  if the current mask drops it: half a quantization step, stage 02's scale / 2

With h, an untrained adapter (weight == master) changes nothing. h alone would leave the largest
removed weight tied with the smallest kept one wherever stage 02 disagreed with magnitude, and any
noise would swap them: in the small demo model, noise of a millionth of the weights' spread flips
7 % of the bits. m requires a real gain, one that rounding does not hide. It applies to the weights
that are *currently* dropped, so a restored weight gains the advantage that its rival had, and
swapping them back takes a change of 2 m, a whole step. This prevents oscillation. h refers to
stage 02's mask for the whole run.

At 16 bits there is no step; m is then a sixteenth of the mean |master| of the row's kept weights (a
row has one unit, and a mean does not depend on how small one weight happens to be). In the small
demo model that is two fifths of int4's m and seven times int8's.

*magnitude* is the plain rule: keep the two largest |weight| of four.

Scales are fixed between updates, because a weight's code must not change when another weight of its
group does. At an update each group's scale follows its largest kept weight: the old scale times
new amax / old amax. This is exactly the old scale if nothing changed, whatever rule stage 02 used
to choose it.

Not supported: saliency from activations (SparseGPT's own criterion) at updates. It would need a
Hessian per layer, kept up to date during training.
"""

from __future__ import annotations

from typing import Literal

import torch

from sparselong.packing import GROUP, code_range

Criterion = Literal["hysteresis", "magnitude"]


def find_margin(
    master: torch.Tensor, stage02_mask: torch.Tensor, stage02_scale: torch.Tensor | None
) -> torch.Tensor:
    """Return the margin by which a dropped weight must exceed a kept one to replace it.

    Args:
        master: [out, in], from stage 02.
        stage02_mask: bool [out, in].
        stage02_scale: bf16 [out, in/group], from stage 02; None at 16 bits.

    Returns:
        fp32 [out, in] (without a scale, [out, 1]).
    """
    if stage02_scale is not None:
        group_size = master.shape[1] // stage02_scale.shape[1]
        return (stage02_scale.float() / 2).repeat_interleave(group_size, dim=1)
    kept = torch.where(stage02_mask, master.float().abs(), 0.0)
    return kept.sum(dim=1, keepdim=True) / stage02_mask.sum(dim=1, keepdim=True) / 16


def score_two_four(
    weight: torch.Tensor,
    master: torch.Tensor,
    stage02_mask: torch.Tensor,
    current_mask: torch.Tensor,
    margin: torch.Tensor,
) -> torch.Tensor:
    """Return the *hysteresis* score that ranks weights within their group of four.

    Args:
        weight: [out, in], the current master + adapter, before mask and rounding.
        master: [out, in], from stage 02.
        stage02_mask: bool [out, in], exactly two of four.
        current_mask: bool [out, in].
        margin: result of `find_margin`.

    Returns:
        fp32 [out, in].
    """
    before = master.float().abs().reshape(-1, GROUP)
    kept = stage02_mask.reshape(-1, GROUP)
    weakest_kept = before.masked_fill(~kept, torch.inf).amin(dim=-1)
    strongest_removed = before.masked_fill(kept, 0.0).amax(dim=-1)
    disagreement = (strongest_removed - weakest_kept).clamp(min=0.0).unsqueeze(-1)
    handicap = torch.where(kept, 0.0, disagreement).reshape(weight.shape)
    return weight.float().abs() - handicap - torch.where(current_mask, 0.0, margin)


def update_mask(
    weight: torch.Tensor,
    master: torch.Tensor,
    stage02_mask: torch.Tensor,
    current_mask: torch.Tensor,
    stage02_scale: torch.Tensor | None,
    criterion: Criterion,
) -> torch.Tensor:
    """Return a mask of the two best of every four; ties keep the current mask.

    Args:
        weight: see `score_two_four`.
        master: see `score_two_four`.
        stage02_mask: see `score_two_four`.
        current_mask: see `score_two_four`.
        stage02_scale: see `find_margin`.
        criterion: `hysteresis` ranks by `score_two_four`, `magnitude` by |weight|.

    Returns:
        bool [out, in], exactly two of every four.
    """
    if criterion == "magnitude":
        scores = weight.float().abs()
    else:
        margin = find_margin(master, stage02_mask, stage02_scale)
        scores = score_two_four(weight, master, stage02_mask, current_mask, margin)
    scores = scores.reshape(-1, GROUP)
    current = current_mask.reshape(-1, GROUP)
    # Two stable sorts order by score, then by current use, then by position.
    by_use = torch.sort(current.to(torch.int8), dim=-1, descending=True, stable=True).indices
    by_score = torch.sort(scores.gather(-1, by_use), dim=-1, descending=True, stable=True).indices
    winners = by_use.gather(-1, by_score)[:, : GROUP // 2]
    mask = torch.zeros_like(current).scatter_(-1, winners, True)
    return mask.reshape(current_mask.shape)


def update_scale(
    weight: torch.Tensor, master: torch.Tensor, stage02_scale: torch.Tensor, bits: int
) -> torch.Tensor:
    """Return scales that follow the largest kept weight of each group.

    Args:
        weight: [out, in], current values, zeros where the current mask drops.
        master: [out, in], from stage 02, zeros where stage 02's mask drops.
        stage02_scale: bf16 [out, in/group].
        bits: 4 or 8.

    Returns:
        bf16 [out, in/group]; exactly the old scale for a group whose amax is unchanged. A group
        that was all zero uses the plain rule: amax over half the code range.
    """
    before = master.float().abs().reshape(*stage02_scale.shape, -1).amax(dim=-1)
    now = weight.float().abs().reshape(*stage02_scale.shape, -1).amax(dim=-1)
    lowest, highest = code_range(bits)
    plain = now / ((highest - lowest) / 2)
    follow = stage02_scale.float() * (now / before)
    return torch.where(before > 0, follow, plain).to(torch.bfloat16)


def update_steps(total_steps: int, update_frequency: float) -> list[int]:
    """Return the steps after which masks are updated, `update_frequency` of the steps apart.

    The last interval has no update, so that the adapter converges on the final masks; a frequency
    of 0 means never.
    """
    if update_frequency == 0:
        return []
    interval = max(1, round(total_steps * update_frequency))
    return list(range(interval, total_steps - interval + 1, interval))


def flipped_fraction(before: torch.Tensor, after: torch.Tensor) -> float:
    """Return the share of bits that differ between two bool masks of the same shape."""
    return (before != after).float().mean().item()
