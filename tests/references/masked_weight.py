"""A masked LoRA layer's weight by its definition in fp64. Shares no code with the package."""

from __future__ import annotations

import torch

from tests.references.two_four import kept_reference


def masked_weight_reference(
    master: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    patterns: torch.Tensor | None,
    scale: torch.Tensor | None,
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight of the forward pass, and where the backward pass lets a gradient through.

    W = M + s B A; what the pattern drops is zero; the rest is rounded to the nearest whole multiple
    of its group's scale, ties to even, from -2^(bits-1) to 2^(bits-1) - 1 times it, then to bf16. A
    gradient passes where the pattern keeps and the multiple was not cut off.

    Args:
        master: [out, in]; lora_a: [r, in]; lora_b: [out, r].
        patterns: uint8 [out, in / 32 * 3]; None keeps everything.
        scale: [out, groups]; None with 16 bits, which are rounded to bf16 only.

    Returns:
        bf16 and bool [out, in].
    """
    weight = master.double() + scaling * (lora_b.double() @ lora_a.double())
    kept = torch.ones_like(weight, dtype=torch.bool)
    if patterns is not None:
        kept = kept_reference(patterns)
    weight = torch.where(kept, weight, 0.0)
    if scale is None:
        return weight.bfloat16(), kept
    step = scale.double().repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    multiple = torch.where(step == 0, 0.0, weight / torch.where(step == 0, 1.0, step)).round()
    most = 2 ** (bits - 1)
    inside = (multiple >= -most) & (multiple <= most - 1)
    return (multiple.clamp(-most, most - 1) * step).bfloat16(), kept & inside
