"""How batches are spread over the processes that evaluate together.

Batches are those of one process, and each is one process's pass: the rounding of a product depends
on its shape, so only equal passes give equal figures. Every process knows all batches and all
lengths, so nothing is negotiated before a pass, and results are gathered once at the end. If the
processes share experts and vocabulary, a pass is collective: a process without a batch runs a
single padding token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sparselong.parallel import Mesh, explain_exchange, replicate_rows, shard_model
from sparselong.runtime import using

Item = TypeVar("Item")


@dataclass(frozen=True)
class Spread:
    """The processes that evaluate together.

    Attributes:
        mesh: this process's place among them; None: it evaluates alone.
        report: called with what is counted, the number that is done, and the total.
    """

    mesh: Mesh | None = None
    report: Callable[[str, int, int], None] | None = None

    @property
    def size(self) -> int:
        """Number of processes."""
        return 1 if self.mesh is None else self.mesh.data_size

    @property
    def rank(self) -> int:
        """This process's number."""
        return 0 if self.mesh is None else self.mesh.data_rank

    @property
    def groups(self) -> int:
        """Number of models that the processes hold."""
        return 1 if self.mesh is None else self.mesh.data_size // self.mesh.expert_size

    @property
    def group(self) -> int:
        """Number of the model of which this process holds all or a part."""
        return 0 if self.mesh is None else self.mesh.data_rank // self.mesh.expert_size

    def rounds(self, batches: list[list[Item]]) -> Iterator[list[list[Item]]]:
        """Yield the batches in groups of one for each process; the last ones may be empty."""
        missing: list[list[Item]] = [[]] * (-len(batches) % self.size)
        batches = batches + missing
        total = len(batches) // self.size
        self.tell("batch", 0, total)
        for done in range(total):
            yield batches[done * self.size : (done + 1) * self.size]
            self.tell("batch", done + 1, total)

    def tell(self, what: str, done: int, total: int) -> None:
        """Report how far the work is."""
        if self.report is not None:
            self.report(what, done, total)

    def settings(self, texts: list[list[list[int]]]) -> AbstractContextManager[Any]:
        """Return a block with the settings of a pass.

        Args:
            texts: the tokens of each process's texts.
        """
        if self.mesh is None:
            return using()
        counts = [rows * tokens for rows, tokens in map(_shape, texts)]
        first = self.rank - self.mesh.expert_rank
        return using(**shard_model(self.mesh, tuple(counts[first : first + self.mesh.expert_size])))

    def same_rows(self) -> AbstractContextManager[Any]:
        """Return a block with the settings of passes in which a model's processes have the same."""
        if self.mesh is None or self.mesh.expert_size == 1:
            return using()
        return using(**replicate_rows(self.mesh))

    def collect(self, value: Any) -> list[Any]:
        """Gather every process's value, in order, however long the others take."""
        if self.mesh is None:
            return [value]
        values: list[Any] = [None] * self.size
        explain_exchange("results", lambda: dist.all_gather_object(values, value))
        return values


def pad(texts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return texts padded on the right, and where tokens are.

    Returns:
        (int64 [rows, tokens], bool of the same shape); one padding token if there is no text.
    """
    ids = torch.zeros(*_shape(texts), dtype=torch.long)
    present = torch.zeros_like(ids, dtype=torch.bool)
    for row, tokens in enumerate(texts):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        present[row, : len(tokens)] = True
    return ids, present


def _shape(texts: list[list[int]]) -> tuple[int, int]:
    return max(1, len(texts)), max(map(len, texts), default=1)
