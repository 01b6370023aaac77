"""Stage 02's layers compressed by several processes, each called with the rank's own arguments."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from sparselong.checkpoint import Checkpoint, open_upstream
from sparselong.compress.layers import LayerStream, compress_layers
from sparselong.compress.work import Spread, Work
from sparselong.config import load
from sparselong.memory import stages
from sparselong.parallel import build_mesh
from sparselong.provenance import read_peaks

BATCH_TOKENS = 256
"""Two sequences of the tests, so that processes have different numbers of batches."""


def compress(
    arguments: list[str],
    base: str,
    folder: str,
    tokens: Any,
    layers: int,
    fails_at: int | None = None,
) -> int:
    """Compress the first layers of a base into a folder; return how many are finished.

    Args:
        arguments: config and overrides.
        base: the base's directory.
        folder: the run directory.
        tokens: calibration sequences.
        layers: how many layers to finish.
        fails_at: layer at which the second process ends.
    """
    directory = Path(folder) / "02_compress"
    if dist.get_rank() == 0:
        for name in ("model.partial", "masters", "work"):
            (directory / name).mkdir(parents=True, exist_ok=True)
    dist.barrier()
    checkpoint = Checkpoint(Path(base))
    if fails_at is not None and dist.get_rank() == 1:
        fail_at(fails_at)
    work = Work(
        config=load(arguments[1], arguments[2:]),
        run_dir=Path(folder),
        folder=directory,
        base=checkpoint,
        architecture=open_upstream(checkpoint),
        tokens=torch.tensor(tokens),
        layers=range(layers),
        spread=Spread(build_mesh(1)),
        tell=lambda text: None,
        progress=lambda done, total, note: None,
        peaks=read_peaks,
    )
    with mock.patch.dict(stages.COMPRESS_BATCH_TOKENS, {"cpu": BATCH_TOKENS}):
        return compress_layers(work, torch.device("cpu"))


def fail_at(layer: int) -> None:
    """End this process when it comes to a layer, as a GPU that is lost does."""
    original = LayerStream.compress

    def compress(self: LayerStream, index: int) -> None:
        if index == layer:
            os._exit(1)
        original(self, index)

    LayerStream.compress = compress
