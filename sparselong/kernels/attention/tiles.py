"""Tile sizes of the Triton attention kernels by architecture, kernel and layer kind.

Sizes are fixed instead of autotuned, so that a first call compiles only three kernels. This module
imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Size of a tile and launch parameters of its program.

    Attributes:
        rows: rows of the tile, heads * queries.
        keys: keys of the tile.
        warps: warps of the program.
        stages: pipeline stages of the program.
        heads: most heads that share the tile.
        split: whether the unmasked part of the tile's range has a loop of its own.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    heads: int = 1
    split: bool = True


# sm_90: the fastest in benchmarks/attention_tiles.py on an H200, 16,384 tokens, bf16, 64/8 heads,
# packed documents of 1,024 tokens on average. sm_80: chosen from the compiler's report (registers,
# spills, shared memory within sm_86's 99 KB), not timed.
TILES: dict[str, dict[tuple[str, str], Tile]] = {
    "sm_90": {
        ("forward", "full"): Tile(128, 64, 8, 3, heads=8),
        ("forward", "packed"): Tile(64, 64, 4, 3, heads=8),
        ("forward", "window"): Tile(128, 32, 4, 3, heads=8, split=False),
        ("dq", "full"): Tile(64, 64, 4, 3),
        ("dq", "packed"): Tile(64, 32, 4, 3, heads=8),
        ("dq", "window"): Tile(64, 32, 4, 3, heads=8, split=False),
        ("dkdv", "full"): Tile(64, 64, 4, 3),
        ("dkdv", "packed"): Tile(64, 64, 4, 3, heads=4),
        ("dkdv", "window"): Tile(64, 64, 4, 3, heads=8, split=False),
    },
    "sm_80": {
        ("forward", "full"): Tile(128, 64, 8, 2),
        ("forward", "packed"): Tile(128, 64, 8, 2),
        ("forward", "window"): Tile(64, 32, 4, 3, heads=8, split=False),
        ("dq", "full"): Tile(64, 32, 4, 3),
        ("dq", "packed"): Tile(64, 32, 4, 3),
        ("dq", "window"): Tile(64, 32, 4, 2, heads=8, split=False),
        ("dkdv", "full"): Tile(32, 64, 4, 2),
        ("dkdv", "packed"): Tile(32, 64, 4, 2),
        ("dkdv", "window"): Tile(32, 64, 4, 2, heads=8, split=False),
    },
}
SPLIT = Tile(16, 64, 4, 3, heads=8, split=False)
FLOAT32 = Tile(32, 32, 8, 1)
FLOAT32_WINDOW = Tile(32, 32, 8, 1, heads=8, split=False)


def tile_for(architecture: str, stage: str, kind: str, float32: bool) -> Tile:
    """Return the tile of a stage (forward, split, dq, dkdv) and kind (full, packed, window)."""
    if stage == "split" and not float32 and architecture != "interpreter":
        return SPLIT
    if float32 or architecture == "interpreter":
        return FLOAT32_WINDOW if kind == "window" else FLOAT32
    return TILES[architecture][stage, kind]
