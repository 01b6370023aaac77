"""Tile sizes of the expert products, by architecture, backend and direction. No torch.

They are fixed rather than autotuned, so a first call compiles only the kernels it needs.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Tile shape of a product (`depth` is the step of the inner dimension) and launch settings.

    `programs` is the number of programs per multiprocessor that run at once.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    programs: int = 1


# Both directions of a backend have the same rows, because they share the list of row tiles.
TILES: dict[str, dict[tuple[str, str], Tile]] = {
    "sm_90": {
        ("decode", "forward"): Tile(128, 256, 64, 8, 4),
        ("decode", "backward"): Tile(128, 256, 64, 8, 4),
        ("packed", "forward"): Tile(128, 128, 128, 4, 2, programs=2),
        ("packed", "backward"): Tile(128, 128, 64, 4, 4, programs=2),
        ("small", "forward"): Tile(16, 64, 128, 4, 3, programs=4),
        ("small", "backward"): Tile(16, 64, 128, 4, 3, programs=4),
    },
    "sm_80": {
        ("decode", "forward"): Tile(128, 128, 32, 8, 3),
        ("decode", "backward"): Tile(128, 128, 32, 8, 3),
        ("packed", "forward"): Tile(64, 128, 64, 8, 2),
        ("packed", "backward"): Tile(64, 128, 64, 8, 2),
        ("small", "forward"): Tile(16, 64, 128, 4, 2, programs=4),
        ("small", "backward"): Tile(16, 64, 128, 4, 2, programs=4),
    },
}
FLOAT32 = Tile(32, 32, 32, 4, 1)


def tile_for(architecture: str, backend: str, direction: str, float32: bool) -> Tile:
    """Return the tile for a backend ("small", "packed" or "decode") and a direction."""
    if float32 or architecture == "interpreter":
        return FLOAT32
    return TILES[architecture][backend, direction]
