"""What stage 02's layers are compressed from, and how several processes share the work.

Each process runs its share of the calibration sequences through every layer. Hessians are summed
over the processes, one of them solves a projection and sends the result to the others, and the
first one writes the layer's files. Sums are exact (hessian.py) and batches the same for any number
of processes: on equal GPUs, one writes the same bytes as several.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import GptOssConfig

from sparselong.checkpoint import Checkpoint
from sparselong.config import Config
from sparselong.parallel import Mesh, all_gather, explain_exchange


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
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

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
