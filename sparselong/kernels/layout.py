"""Memory layout that kernels require of their inputs."""

from __future__ import annotations

import torch


def with_unit_stride(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the tensors, copying those whose last axis does not have stride 1."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)
