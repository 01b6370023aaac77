"""Which part of the tables a rank holds, and what both kinds of vocabulary check about it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from sparselong.parallel.placement import Placement


@dataclass(frozen=True)
class Share:
    """The rows of embedding and lm_head that one rank of a group holds.

    Attributes:
        placement: the rank's place in the group.
        group: the ranks that hold the whole tables together.
    """

    placement: Placement
    group: dist.ProcessGroup

    def __post_init__(self) -> None:
        found = Placement(dist.get_rank(self.group), dist.get_world_size(self.group))
        if self.placement != found:
            raise ValueError(f"placement: {self.placement}; allowed: {found}, as in the group")

    def held(self, vocab: int) -> range:
        """Return which of the vocabulary's rows this process holds."""
        return self.placement.vocabulary(vocab)

    def most_held(self, vocab: int) -> int:
        """Return how many rows a full share has: token t is in share t // most_held."""
        return len(replace(self.placement, rank=0).vocabulary(vocab))

    def check_table(self, table: torch.Tensor, vocab: int) -> None:
        """Raise ValueError unless the table is this process's frozen share."""
        rows = len(self.held(vocab))
        if table.dim() != 2 or len(table) != rows:
            raise ValueError(
                f"table: {list(table.shape)}; allowed: [{rows}, width], rank "
                f"{self.placement.rank}'s rows of {vocab} over {self.placement.size} ranks"
            )
        if table.requires_grad and torch.is_grad_enabled():
            raise ValueError("table: requires a gradient; allowed: a frozen embedding or lm_head")
