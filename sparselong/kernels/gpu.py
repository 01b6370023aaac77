"""Properties of a GPU that decide a kernel's backend, tiles and grid.

A device has two keys, because the two kinds of table generalize differently. Which backend is
fastest was measured on one compute capability and says nothing about others; a tile serves every
GPU whose shared memory holds it. Results are cached, because a driver call before every launch
would cost measurable time.
"""

from __future__ import annotations

import functools

import torch

_INTERPRETED_PROGRAMS = 4
"""Grid size under Triton's sequential interpreter: small, so that programs loop over tiles."""


@functools.cache
def architecture_of(device: torch.device) -> str:
    """Return the key of measured tables: "cpu", or sm_ and the capability, as in "sm_86"."""
    if device.type != "cuda":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def tiles_of(device: torch.device) -> str:
    """Return the key of tile tables: "interpreter" (Triton's) for devices other than CUDA.

    Raises:
        ValueError: as for `tiles_of_capability`.
    """
    if device.type != "cuda":
        return "interpreter"
    return tiles_of_capability(*torch.cuda.get_device_capability(device))


def tiles_of_capability(major: int, minor: int) -> str:
    """Return the key of tile tables for a compute capability.

    sm_80, sm_86 and sm_89 share tiles that fit sm_86's 99 KB of shared memory. Capabilities above
    sm_90 use sm_90's.

    Raises:
        ValueError: the capability is below sm_80, the oldest that is supported.
    """
    if (major, minor) < (8, 0):
        raise ValueError(f"device: sm_{major}{minor}; allowed: sm_80 and newer")
    return "sm_90" if major >= 9 else "sm_80"


@functools.cache
def multiprocessors_of(device: torch.device) -> int:
    """Return the number of multiprocessors, the grid size of persistent kernels."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count
