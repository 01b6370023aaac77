"""Which device a process computes on, and in which dtype."""

from __future__ import annotations

import torch


def default_device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU; float32 on a CPU, where bfloat16 is slower and less exact."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
