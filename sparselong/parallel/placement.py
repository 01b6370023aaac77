"""Which experts and which rows of the vocabulary a process holds.

Experts are split evenly over the processes of an expert group, in order; so are the rows of
embedding and lm_head, but the last processes may hold fewer.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparselong.errors import StageError


@dataclass(frozen=True)
class Placement:
    """A process's place in its expert group.

    Attributes:
        rank: index in the group.
        size: number of processes in the group.
    """

    rank: int = 0
    size: int = 1

    def experts(self, count: int) -> range:
        """Return which of a layer's `count` experts the process holds.

        Raises:
            StageError: they cannot be split evenly.
        """
        if count % self.size:
            divisors = [n for n in range(1, count + 1) if count % n == 0]
            raise StageError(
                f"{count} experts cannot be split evenly over {self.size} processes",
                f"a number of processes that divides {count}",
                f"{self.size} processes",
                f"set expert_parallel_degree to one of {', '.join(map(str, divisors))}",
            )
        share = count // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def vocabulary(self, rows: int) -> range:
        """Return which of the `rows` rows of embedding and lm_head the process holds."""
        share = -(-rows // self.size)
        return range(min(rows, self.rank * share), min(rows, (self.rank + 1) * share))
