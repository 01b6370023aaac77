"""What launchers ask of a GPU: its name in measured tables and in tables of tiles, and its size.

Two names, because the two kinds of table differ in what they lump together. Which backend is the
fastest was measured on one compute capability and says nothing of its neighbours; a tile size
serves all that can hold it. Asked once a device: a driver call for each launch would show.
"""

from __future__ import annotations

import functools

import torch

_INTERPRETED_PROGRAMS = 4
"""The interpreter's programs run one after another; a few show the loops over tiles."""


@functools.cache
def architecture_of(device: torch.device) -> str:
    """The name in measured tables: "cpu", or sm_ and the capability's digits, as in "sm_86"."""
    if device.type != "cuda":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def tiles_of(device: torch.device) -> str:
    """The name of a device's tiles; "interpreter" for tensors that only Triton's can run on.

    Raises:
        ValueError: see `tiles_of_capability`.
    """
    if device.type != "cuda":
        return "interpreter"
    return tiles_of_capability(*torch.cuda.get_device_capability(device))


def tiles_of_capability(major: int, minor: int) -> str:
    """The name of a compute capability's tiles.

    sm_80, sm_86 and sm_89 share tiles: these fit sm_86's 99 KB. Newer ones than sm_90 take sm_90's.

    Raises:
        ValueError: a GPU before sm_80, for which nothing here was built.
    """
    if (major, minor) < (8, 0):
        raise ValueError(f"device: sm_{major}{minor}; allowed: sm_80 and newer")
    return "sm_90" if major >= 9 else "sm_80"


@functools.cache
def multiprocessors_of(device: torch.device) -> int:
    """How many programs a device runs at once, counting one a multiprocessor."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count
