"""Which two of every four weights stay, chosen anew while the adapter learns; and the scales.

Stage 02 removed two weights of every four with SparseGPT: not the two smallest, but the two whose
loss the survivors could absorb best. The survivors were corrected for it, the removed ones kept
their old values in the masters. Choosing masks by magnitude right afterwards would undo part of
that choice although nothing has been learned yet: it flips about 7 % of the bits and brings back
weights whose work the survivors have already taken over.

So the default criterion, *hysteresis*, asks what has changed since stage 02, and by how much. The
two highest scores of four stay, where a weight's score is |weight| less two handicaps:

    h  if stage 02 removed it:  max(0, largest |master| removed − smallest |master| kept),
       which is how far magnitude disagreed with stage 02 in this group of four
    m  if it is not in use now: half a quantization step, stage 02's scale / 2

h makes the untrained adapter (weight == master) change nothing. h alone would leave the strongest
removed weight level with the weakest survivor wherever stage 02 disagreed with magnitude, and any
noise would swap them: in the small demo model, noise of a millionth of the weights' spread flips
5 % of the bits. m asks for a real gain: a weight that cannot be told from its rival after rounding
has none. m is held against whoever is out of use *now*. So a weight that came back has it in its
favour, as the survivor had before, and to swap the two again takes a change of two m, a whole step:
no bit flickers. The reference of h stays stage 02's mask for the whole run.

With 16 bits there is no step; m is then a sixteenth of the mean |master| of the kept weights of
the row (a row has one unit, and a mean does not depend on how small one weight happens to be).
In the small demo model that is two fifths of int4's m and seven times int8's.

*magnitude* is the plain rule: the two largest |weight| of four.

Between updates the scales are fixed, as the codes of a weight must not change because its neighbour
did. At an update each group's scale follows the group's largest kept weight: the old scale times
new amax / old amax, which is exactly the old scale where nothing changed, whatever rule stage 02
used to choose it.

Left out: saliency from activations (SparseGPT's own criterion) at updates. It would need a Hessian
per layer kept up to date during training.
"""

from __future__ import annotations

from typing import Literal

import torch

from sparselong.packing import GROUP, code_range

Criterion = Literal["hysteresis", "magnitude"]


def find_margin(
    master: torch.Tensor, stage02_mask: torch.Tensor, stage02_scale: torch.Tensor | None
) -> torch.Tensor:
    """What a weight out of use must be ahead by to replace one in use.

    Args:
        master: [out, in] as stage 02 left it.
        stage02_mask: bool [out, in].
        stage02_scale: bf16 [out, in/group] as stage 02 left it; None for 16 bits.

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
    """The score by which weights compete within their group of four under *hysteresis*.

    Args:
        weight: [out, in] as trained so far (master + adapter), before mask and rounding.
        master: [out, in] as stage 02 left it.
        stage02_mask: bool [out, in], exactly two of four.
        current_mask: bool [out, in], the mask in use.
        margin: `find_margin`'s.

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
    """The two best of every four; ties stay as they are now.

    Args:
        weight, master, stage02_mask, current_mask: as for `score_two_four`.
        stage02_scale: as for `find_margin`.
        criterion: `hysteresis` takes `score_two_four`, `magnitude` the plain |weight|.

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
    # Sort by (score, in use now, earlier position): a stable sort of a stable sort.
    by_use = torch.sort(current.to(torch.int8), dim=-1, descending=True, stable=True).indices
    by_score = torch.sort(scores.gather(-1, by_use), dim=-1, descending=True, stable=True).indices
    winners = by_use.gather(-1, by_score)[:, : GROUP // 2]
    mask = torch.zeros_like(current).scatter_(-1, winners, True)
    return mask.reshape(current_mask.shape)


def update_scale(
    weight: torch.Tensor, master: torch.Tensor, stage02_scale: torch.Tensor, bits: int
) -> torch.Tensor:
    """Scales that follow the largest kept weight of each group.

    Args:
        weight: [out, in] as trained so far, zeros where the current mask drops.
        master: [out, in] as stage 02 left it, zeros where stage 02's mask drops.
        stage02_scale: bf16 [out, in/group].
        bits: 4 or 8.

    Returns:
        bf16 [out, in/group]; the very same scale for a group whose amax has not changed. A group
        that was all zero takes the plain rule: amax over half the code range.
    """
    before = master.float().abs().reshape(*stage02_scale.shape, -1).amax(dim=-1)
    now = weight.float().abs().reshape(*stage02_scale.shape, -1).amax(dim=-1)
    lowest, highest = code_range(bits)
    plain = now / ((highest - lowest) / 2)
    follow = stage02_scale.float() * (now / before)
    return torch.where(before > 0, follow, plain).to(torch.bfloat16)


def update_steps(total_steps: int, update_frequency: float) -> list[int]:
    """The steps after which masks are chosen anew: every `update_frequency` of the steps.

    Nothing is updated within the last interval, in which the adapter settles on final masks; a
    frequency of 0 means never.
    """
    if update_frequency == 0:
        return []
    interval = max(1, round(total_steps * update_frequency))
    return list(range(interval, total_steps - interval + 1, interval))


def flipped_fraction(before: torch.Tensor, after: torch.Tensor) -> float:
    """The share of mask bits that differ between two bool masks of the same shape."""
    return (before != after).float().mean().item()
