"""Tile sizes of the Triton attention kernels, by architecture, kernel and layer kind. No torch.

Fixed here and not searched for at run time, so that a first call compiles three kernels and no
more.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Rows (heads * queries) and keys of one tile, warps and pipeline stages of its program."""

    rows: int
    keys: int
    warps: int
    stages: int
    heads: int = 1


TILES: dict[str, dict[tuple[str, str], Tile]] = {
    "sm_90": {
        ("forward", "full"): Tile(128, 64, 4, 3),
        ("forward", "window"): Tile(128, 64, 4, 2, heads=8),
        ("dq", "full"): Tile(128, 64, 8, 2),
        ("dq", "window"): Tile(128, 64, 8, 2, heads=8),
        ("dkdv", "full"): Tile(64, 128, 8, 2),
        ("dkdv", "window"): Tile(128, 64, 8, 2, heads=8),
    },
    "sm_80": {
        ("forward", "full"): Tile(128, 64, 4, 3),
        ("forward", "window"): Tile(128, 64, 4, 2, heads=8),
        ("dq", "full"): Tile(64, 64, 4, 2),
        ("dq", "window"): Tile(64, 64, 4, 2, heads=8),
        ("dkdv", "full"): Tile(64, 64, 4, 2),
        ("dkdv", "window"): Tile(64, 64, 4, 2, heads=8),
    },
}
FLOAT32 = Tile(32, 32, 4, 1)
FLOAT32_WINDOW = Tile(32, 32, 4, 1, heads=8)


def architecture_of(major: int, minor: int) -> str:
    """The table's name for a compute capability.

    sm_80, sm_86 and sm_89 share tiles: these fit sm_86's 99 KB. Newer ones than sm_90 take sm_90's.

    Raises:
        ValueError: a GPU before sm_80, for which nothing here was built.
    """
    if (major, minor) < (8, 0):
        raise ValueError(f"device: sm_{major}{minor}; allowed: sm_80 and newer")
    return "sm_90" if major >= 9 else "sm_80"


def tile_for(architecture: str, stage: str, kind: str, float32: bool) -> Tile:
    """The tile for `stage` (forward, dq, dkdv) of a `kind` (full, window) layer."""
    if float32 or architecture == "interpreter":
        return FLOAT32 if kind == "full" else FLOAT32_WINDOW
    return TILES[architecture][stage, kind]
