"""A sharded vocabulary for ranks that all hold the same rows: generation.

Rows need not be gathered, and results need not be sent home: each rank adds its columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional

from sparselong.kernels.layer import CHUNK_ROWS, IGNORED, check_loss_arguments
from sparselong.parallel.collectives import start_all_gather
from sparselong.parallel.vocabulary.embedding import embed_replicated
from sparselong.parallel.vocabulary.loss import Head, score_chunks
from sparselong.parallel.vocabulary.rows import Chunk
from sparselong.parallel.vocabulary.shares import Share

LOGITS = "logits"


@dataclass(frozen=True)
class ReplicatedVocabulary(Share):
    """This rank's shard of the vocabulary, in passes in which all ranks have the same rows.

    Attributes:
        chunk_rows: the most rows whose logits exist at once are P times as many.
    """

    chunk_rows: int = CHUNK_ROWS

    def embed(self, ids: torch.Tensor, table: torch.Tensor, vocab: int) -> torch.Tensor:
        """Return the embeddings of the tokens, [..., width], as `ShardedVocabulary.embed`.

        On a GPU the host does not wait for the result.
        """
        self.check_table(table, vocab)
        return embed_replicated(ids, table, vocab, self)

    def logits(self, hidden: torch.Tensor, table: torch.Tensor, vocab: int) -> torch.Tensor:
        """Return one row's logits over the whole vocabulary, the same bits on every rank.

        Args:
            hidden: [..., width], one row: more would need a table's worth of memory.
            table: [held, width], this process's rows of the lm_head.
            vocab: number of tokens in the vocabulary.

        Returns:
            [..., vocab] in hidden's dtype.

        Raises:
            ValueError: the arguments are not as above.
            ExchangeError: a rank is gone, or did not take part in time.
        """
        self.check_table(table, vocab)
        return self.gather_logits(functional.linear(hidden, table), vocab)

    def gather_logits(self, part: torch.Tensor, vocab: int) -> torch.Tensor:
        """Return [..., vocab], one row's logits, from this process's columns [..., held] of them.

        On a GPU the host does not wait for the result.
        """
        held, most = len(self.held(vocab)), self.most_held(vocab)
        if part.numel() != held or part.shape[-1:] != (held,):
            raise ValueError(f"part: {list(part.shape)}; allowed: [..., {held}], one row's logits")
        padded = functional.pad(part.flatten(), (0, most - held))
        whole = start_all_gather(padded, self.group, LOGITS).wait()
        return whole.flatten()[:vocab].view(*part.shape[:-1], vocab)

    def sum_losses(
        self, hidden: torch.Tensor, table: torch.Tensor, labels: torch.Tensor, vocab: int
    ) -> torch.Tensor:
        """Return the rows' summed cross-entropy, as `ShardedVocabulary`, without a gradient.

        Raises:
            ValueError: as there, or hidden requires a gradient.
        """
        if hidden.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "hidden: requires a gradient; allowed with replicated rows: none, "
                "training has rows of its own on each rank"
            )
        kept = labels != IGNORED
        return -self.score(hidden[kept], table, labels[kept], vocab)[0].sum()

    @torch.no_grad()
    def score(
        self, hidden: torch.Tensor, table: torch.Tensor, labels: torch.Tensor, vocab: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each row's log-probability of its label, and the token of its largest logit.

        As `ShardedVocabulary.score`.
        """
        self.check_table(table, vocab)
        check_loss_arguments(hidden, table, labels, self.chunk_rows)
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < vocab:
            raise ValueError(
                f"labels: between {int(labels.min())} and {int(labels.max())}; "
                f"allowed: 0 to {vocab - 1}"
            )
        rank, chunk_rows = self.placement.rank, self.chunk_rows * self.placement.size
        head = Head(self.held(vocab).start, rank, self.group, self.chunk_rows)
        buffer = hidden.new_empty(min(len(hidden), chunk_rows), len(table))
        chunks = _split(hidden, labels, chunk_rows)
        return score_chunks(chunks, table, buffer, head, len(hidden))


def _split(hidden: torch.Tensor, labels: torch.Tensor, chunk_rows: int) -> Iterator[Chunk]:
    """Yield the rows in chunks, all of them this rank's own."""
    for first in range(0, len(hidden), chunk_rows):
        place = slice(first, first + chunk_rows)
        rows = hidden[place]
        yield Chunk(rows, labels[place], (len(rows),), slice(None), place)
