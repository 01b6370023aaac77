"""Weight of a masked LoRA layer by definition, in fp64. Shares no code with the package."""

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
    more: tuple[tuple[torch.Tensor, torch.Tensor], ...] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weight of the forward pass, and where its gradient passes through.

    W = M + s B A. Elements dropped by the pattern are zero. The others are rounded to the nearest
    integer multiple of their group's scale (ties to even), clamped to [-2^(bits-1), 2^(bits-1) - 1]
    times the scale, then rounded to bf16. A gradient passes if the element is kept and not clamped.

    Args:
        master: [out, in].
        lora_a: [r, in].
        lora_b: [out, r].
        patterns: uint8 [out, in / 32 * 3]; None keeps everything.
        scale: [out, groups]; None with 16 bits, which only round to bf16.
        more: A and B of the rows after those of lora_b.

    Returns:
        Weight bf16 and mask bool, both [out, in].
    """
    products = [b.double() @ a.double() for a, b in ((lora_a, lora_b), *more)]
    weight = master.double() + scaling * torch.cat(products)
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
