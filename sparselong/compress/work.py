"""What stage 02's layers are compressed from, and how several processes share the work.

The stage's process opens the inputs and publishes the result. If torchrun started several, ranks of
their own (rank.py) compress the layers, to which it hands the calibration tokens and the paths.
Each rank runs its share of the calibration sequences through every layer. Hessians are summed over
the ranks, one of them solves a projection and sends the result to the others, and the first one
writes the layer's files. Sums are exact (hessian.py) and batches the same for any number of
processes: on equal GPUs, one writes the same bytes as several. Whichever rank is lost, the same
command with any number of processes resumes after the last layer whose states were saved.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import GptOssConfig

from sparselong.checkpoint import Checkpoint, write_tensors
from sparselong.config import Config
from sparselong.errors import StageError
from sparselong.files import read_json, write_atomically
from sparselong.parallel import Mesh, all_gather, explain_exchange
from sparselong.processes import joined_world, train_together
from sparselong.run import Stage

RANKS, TOKENS = "ranks.json", "tokens.safetensors"
"""What the ranks are told, and their calibration tokens, in `02_compress/work`."""


class Spread:
    """This process among those that share the work.

    Args:
        mesh: the processes; None: this one is alone.

    Attributes:
        rank: its number.
        size: how many there are.
    """

    def __init__(self, mesh: Mesh | None = None):
        self._group = None if mesh is None else mesh.world_group
        self.rank = 0 if self._group is None else dist.get_rank(self._group)
        self.size = 1 if self._group is None else dist.get_world_size(self._group)

    @property
    def is_first(self) -> bool:
        """Whether this process writes what all have made."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Return this process's consecutive share of `count` things."""
        return self.share_of(self.rank, count)

    def share_of(self, rank: int, count: int) -> range:
        """Return a process's consecutive share of `count` things."""
        return range(count * rank // self.size, count * (rank + 1) // self.size)

    def add(self, tensor: torch.Tensor, tag: str) -> torch.Tensor:
        """Return the sum of all processes' tensors, added in the order of ranks.

        Raises:
            ExchangeError: another process is gone.
        """
        if self._group is None:
            return tensor
        total, *others = all_gather(tensor, self._group, tag)
        for other in others:
            total += other
        return total

    def send(self, tensor: torch.Tensor, owner: int, tag: str) -> torch.Tensor:
        """Return the owner's tensor; those of the others are overwritten.

        Raises:
            ExchangeError: another process is gone.
        """
        if self._group is not None:
            raw = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
            explain_exchange(tag, lambda: dist.broadcast(raw, owner, group=self._group))
        return tensor

    def wait(self, tag: str) -> None:
        """Wait until all processes are here.

        Raises:
            ExchangeError: another process is gone.
        """
        if self._group is not None:
            all_gather(torch.zeros(1), self._group, tag)


@dataclass(frozen=True)
class Work:
    """What the layers are compressed from, the same in every process.

    Attributes:
        config: the run's config.
        run_dir: its directory.
        folder: stage 02's directory.
        base: the opened checkpoint.
        architecture: its architecture.
        tokens: calibration sequences, int64 [sequences, length].
        layers: the layers of this command, of which the first may be done already.
        spread: the processes that share the work.
        tell: called with a line of text.
        progress: called with the number of finished layers, that of all, and a note.
        peaks: returns the peak bytes of all processes by device; called by all of them.
    """

    config: Config
    run_dir: Path
    folder: Path
    base: Checkpoint
    architecture: GptOssConfig
    tokens: torch.Tensor
    layers: range
    spread: Spread
    tell: Callable[[str], None]
    progress: Callable[[int, int, str], None]
    peaks: Callable[[], dict[str, int]]


def rank_arguments(stage: Stage) -> Sequence[str]:
    """Return the Python arguments that run a rank of the stage."""
    return ["-m", "sparselong.compress.rank", str((stage.dir / "work" / RANKS).absolute())]


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
    write_atomically(folder / RANKS, json.dumps(told))
    world = joined_world(stage.config)
    stage.log(f"compressing in {world.size} processes")
    train_together(stage, rank_arguments(stage), world)
    done = read_json(folder / RANKS).get("done")
    if not isinstance(done, int):
        raise StageError(
            "rank 0 ended without saying how many layers are finished",
            f"`done` in {folder / RANKS}",
            "none",
            f"run {stage.same_command} again",
        )
    return done


def read_work(path: Path) -> tuple[dict[str, Any], torch.Tensor]:
    """Return what `compress_together` told the ranks, and the tokens [sequences, length]."""
    return read_json(path), load_file(path.with_name(TOKENS))["tokens"]
