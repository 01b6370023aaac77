"""The default device and compute dtype of a process."""

from __future__ import annotations

import torch


def default_device() -> torch.device:
    """Return the first GPU if there is one, else the CPU."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 for a GPU, float32 for a CPU, where bfloat16 is slower and less exact."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
