"""A masked LoRA layer's weight in plain torch: the CPU backend."""

from __future__ import annotations

import torch

from sparselong.packing import integer, two_four

Pairs = tuple[tuple[torch.Tensor, torch.Tensor], ...]
"""A and B of further rows, as in `MaskedWeight`."""


def sum_weight(
    master: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    more: Pairs = (),
) -> torch.Tensor:
    """Return M + s·B·A, fp32 [out, in], from master [out, in], lora_a [r, in], lora_b [out, r]."""
    pairs = ((lora_a, lora_b), *more)
    parts = master.float().split([b.shape[0] for _, b in pairs])
    with torch.autocast(master.device.type, enabled=False):
        sums = [
            torch.addmm(part, b.float(), a.float(), alpha=scaling)
            for part, (a, b) in zip(parts, pairs, strict=True)
        ]
    return sums[0] if len(sums) == 1 else torch.cat(sums)


def round_weight(
    master: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    patterns: torch.Tensor | None,
    scale: torch.Tensor | None,
    bits: int,
    more: Pairs = (),
) -> torch.Tensor:
    """Return the pruned and rounded sum, bf16 [out, in]; arguments as in `MaskedWeight`."""
    weight = sum_weight(master, lora_a, lora_b, scaling, more)
    if patterns is not None:
        weight = torch.where(two_four.unpack_mask(patterns), weight, 0.0)
    if scale is None:
        return weight.to(torch.bfloat16)
    return integer.dequantize(integer.quantize(weight, scale, bits), scale)


def passes(
    master: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    patterns: torch.Tensor | None,
    scale: torch.Tensor | None,
    bits: int,
    more: Pairs = (),
) -> torch.Tensor:
    """Return bool [out, in]: whether the mask keeps a weight and its code is not clamped."""
    inside = torch.ones(master.shape, dtype=torch.bool, device=master.device)
    if patterns is not None:
        inside &= two_four.unpack_mask(patterns)
    if scale is not None:
        lowest, highest = integer.code_range(bits)
        weight = sum_weight(master, lora_a, lora_b, scaling, more)
        step = scale.float().unsqueeze(-1)
        ratio = torch.where(step == 0, 0.0, weight.reshape(*scale.shape, -1) / step)
        codes = torch.round(ratio).reshape(master.shape)
        inside &= (codes >= lowest) & (codes <= highest)
    return inside


def factor_gradients(
    outer: torch.Tensor, gate: torch.Tensor | None, pairs: Pairs, scaling: float
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the gradients of each layer's A and B, as `MaskedWeight.factor_gradients`."""
    passed = outer if gate is None else outer.mul_(gate)
    passed.mul_(scaling)
    parts = passed.split([b.shape[0] for _, b in pairs])
    return [
        (b.float().T @ part, part @ a.float().T) for part, (a, b) in zip(parts, pairs, strict=True)
    ]
