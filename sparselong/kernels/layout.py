"""How tensors must lie in memory before a kernel reads them."""

from __future__ import annotations

import torch


def with_unit_stride(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors, those copied whose last axis is not read in steps of one element."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)
