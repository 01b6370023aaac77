"""Stored 2:4 patterns decoded by definition. Shares no code with the package."""

from __future__ import annotations

import torch

KEPT = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
"""Positions kept of four adjacent weights, by pattern number."""


def kept_reference(patterns: torch.Tensor) -> torch.Tensor:
    """Decode uint8 [out, in / 32 * 3] to bool [out, in]: three bytes hold eight 3-bit patterns, the
    first in the lowest bits."""
    first, second, third = (patterns[:, byte::3].long() for byte in range(3))
    word = first + 256 * second + 65536 * third
    columns = []
    for group in range(8):
        number = word // 8**group % 8
        for place in range(4):
            keeping = [pattern for pattern, pair in enumerate(KEPT) if place in pair]
            columns.append(sum((number == pattern).long() for pattern in keeping) == 1)
    return torch.stack(columns, -1).flatten(1)  # type: ignore[arg-type]
