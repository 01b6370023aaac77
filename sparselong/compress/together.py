"""Compressing in several processes, one for each GPU that torchrun started one for.

The stage's process opens the inputs and publishes the result. The layers are compressed by the
ranks (rank.py), to which it hands the calibration tokens and the paths; rank 0 writes the files.
Whichever rank is lost, the same command with any number of processes resumes after the last layer
whose states were saved.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sparselong.checkpoint import write_tensors
from sparselong.compress.work import Work
from sparselong.errors import StageError
from sparselong.files import read_json, write_atomically
from sparselong.processes import joined_world, train_together
from sparselong.run import Stage

WORK, TOKENS = "ranks.json", "tokens.safetensors"
"""What the ranks are told, and their calibration tokens, in `02_compress/work`."""


def rank_arguments(stage: Stage) -> Sequence[str]:
    """Return the Python arguments that run a rank of the stage."""
    return ["-m", "sparselong.compress.rank", str((stage.dir / "work" / WORK).absolute())]


def compress_together(stage: Stage, work: Work) -> int:
    """Compress the layers of `work` in the processes that torchrun started.

    Returns:
        The number of finished layers.

    Raises:
        StageError: a rank failed, which the message names.
    """
    folder = stage.dir / "work"
    write_tensors(folder / TOKENS, {"tokens": work.tokens})
    told = {
        "run_dir": str(stage.run_dir.absolute()),
        "base": str(work.base.directory.absolute()),
        "layers": [work.layers.start, work.layers.stop],
    }
    write_atomically(folder / WORK, json.dumps(told))
    world = joined_world(stage.config)
    stage.log(f"compressing in {world.size} processes")
    train_together(stage, rank_arguments(stage), world)
    done = read_json(folder / WORK).get("done")
    if not isinstance(done, int):
        raise StageError(
            "rank 0 ended without saying how many layers are finished",
            f"`done` in {folder / WORK}",
            "none",
            f"run {stage.same_command} again",
        )
    return done


def read_work(path: Path) -> tuple[dict[str, Any], torch.Tensor]:
    """Return what `compress_together` told the ranks, and the tokens [sequences, length]."""
    return read_json(path), load_file(path.with_name(TOKENS))["tokens"]
