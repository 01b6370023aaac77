"""One sweep over a weight's columns by definition, in fp64. Shares no code with the package."""

from __future__ import annotations

import torch


def sweep_reference(
    weight: torch.Tensor, factor: torch.Tensor, bits: int, sparse: bool, group: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return values before rounding, kept (bool), codes (bf16 values at 16 bits) and scales."""
    weight, factor = weight.double().clone(), factor.double()
    kept = torch.ones(weight.shape, dtype=torch.bool)
    codes, values = torch.zeros_like(weight), torch.zeros_like(weight)
    scales = torch.ones(len(weight), weight.shape[1] // group, dtype=torch.float64)
    for r, row in enumerate(weight):
        for j in range(len(row)):
            if sparse and j % 4 == 0:
                kept[r, j : j + 4] = keep_largest(row[j : j + 4] / factor.diagonal()[j : j + 4])
            if bits < 16 and j % group == 0:
                part = slice(j, j + group)
                scales[r, j // group] = find_scale(row[part], factor.diagonal()[part], bits, sparse)
            values[r, j] = row[j]
            codes[r, j], represented = represent(row[j], scales[r, j // group], bits)
            if not kept[r, j]:
                codes[r, j] = represented = 0.0
            row[j + 1 :] -= (values[r, j] - represented) / factor[j, j] * factor[j, j + 1 :]
    return values, kept, codes, scales


def keep_largest(four: torch.Tensor) -> torch.Tensor:
    """Return which two of four numbers have the largest magnitudes."""
    sizes = four.abs().tolist()
    best = sorted(range(4), key=lambda place: (-sizes[place], place))[:2]
    return torch.tensor([place in best for place in range(4)])


def represent(value: torch.Tensor, scale: torch.Tensor, bits: int) -> tuple[torch.Tensor, ...]:
    """Return the nearest code and the bf16 number that it stands for."""
    if bits == 16:
        return value.bfloat16().double(), value.bfloat16().double()
    code = (value / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return code, (code * scale).bfloat16().double()


def find_scale(
    group: torch.Tensor, diagonal: torch.Tensor, bits: int, sparse: bool
) -> torch.Tensor:
    """Return the scale of the largest kept magnitude, or of 1/2 to 15/16 of it where the weighted
    squared error is less than half and the least of them."""
    if sparse:
        ranked = (group / diagonal).reshape(-1, 4)
        group = group * torch.stack([keep_largest(four) for four in ranked]).flatten()
    tried = []
    for number in range(9):
        scale = group.abs().max() / (2 ** (bits - 1) - 0.5) * (16 - number) / 16
        scale = scale.bfloat16().double()
        if scale == 0:
            scale = torch.tensor(2.0**-7, dtype=torch.float64)
        cost = ((group - represent(group, scale, bits)[1]) / diagonal).square().sum()
        tried.append((float(cost), number, scale))
    best = min(tried[1:])
    return best[2] if best[0] < tried[0][0] / 2 else tried[0][2]
