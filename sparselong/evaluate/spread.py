"""How the rows of a batch are spread over the processes that evaluate together.

Every process knows all batches and all lengths. Of a batch it takes every size-th row, so nothing
is negotiated before a pass, and results are gathered once at the end. If the processes share
experts and vocabulary, a pass is collective: a process without a row runs a single padding token.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from sparselong.parallel import Mesh, explain_exchange, shard_model
from sparselong.runtime import using


@dataclass(frozen=True)
class Spread:
    """The processes that evaluate together.

    Attributes:
        mesh: this process's place among them; None: it evaluates alone.
    """

    mesh: Mesh | None = None

    @property
    def size(self) -> int:
        """Number of processes."""
        return 1 if self.mesh is None else self.mesh.data_size

    @property
    def rank(self) -> int:
        """This process's number."""
        return 0 if self.mesh is None else self.mesh.data_rank

    def own(self, rows: int) -> range:
        """Return which of a batch's rows are this process's."""
        return range(self.rank, rows, self.size)

    def pad(self, batch: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this process's rows of a batch, padded on the right, and where tokens are.

        All processes pad to the batch's longest row, as one process does: how a product is rounded
        depends on its shape.

        Returns:
            (int64 [rows, tokens], bool of the same shape); one padding token if it has no row.
        """
        own = [batch[row] for row in self.own(len(batch))]
        ids = torch.zeros(*_shape(own, batch), dtype=torch.long)
        present = torch.zeros_like(ids, dtype=torch.bool)
        for row, tokens in enumerate(own):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            present[row, : len(tokens)] = True
        return ids, present

    def settings(self, batch: list[list[int]]) -> AbstractContextManager[Any]:
        """Return a block with the settings of a pass over the batch's padded rows."""
        counts = []
        for rank in range(self.size):
            rows, tokens = _shape(batch[rank :: self.size], batch)
            counts.append(rows * tokens)
        if self.mesh is None:
            return using()
        first = self.rank - self.mesh.expert_rank
        return using(**shard_model(self.mesh, tuple(counts[first : first + self.mesh.expert_size])))

    def collect(self, value: Any) -> list[Any]:
        """Gather every process's value, in order, however long the others take."""
        if self.mesh is None:
            return [value]
        values: list[Any] = [None] * self.size
        explain_exchange("results", lambda: dist.all_gather_object(values, value))
        return values


def _shape(own: list[list[int]], batch: list[list[int]]) -> tuple[int, int]:
    return (len(own), max(map(len, batch))) if own else (1, 1)
