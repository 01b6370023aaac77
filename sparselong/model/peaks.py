"""Peak memory of this process, on the host and on each GPU."""

from __future__ import annotations

import torch

from sparselong import provenance


def reset_peaks() -> None:
    """Starts a new measurement."""
    provenance.reset_peak_host_memory()
    if torch.cuda.is_available():
        torch.cuda.init()  # the statistics exist from then on
    for index in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(index)


def read_peaks() -> dict[str, int]:
    """Bytes since the last reset: `host` (resident) and `cuda:N` (allocated through torch)."""
    devices = range(torch.cuda.device_count())
    return {
        "host": provenance.peak_host_bytes(),
        **{f"cuda:{index}": torch.cuda.max_memory_allocated(index) for index in devices},
    }
