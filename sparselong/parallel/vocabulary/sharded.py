"""A sharded vocabulary for ranks that hold different rows: shards of a sequence, or sequences.

`runtime.Settings.vocabulary` is a `ShardedVocabulary` in training and in evaluation. The ranks of
its group may have any numbers of rows, also none. Each calls the same methods in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from sparselong.kernels.layer import CHUNK_ROWS, IGNORED, check_loss_arguments
from sparselong.parallel.collectives import start_all_gather
from sparselong.parallel.vocabulary.divergence import (
    COMPARED_ROWS,
    Divergence,
    combine_divergence,
    shard_divergence,
)
from sparselong.parallel.vocabulary.embedding import embed_rows
from sparselong.parallel.vocabulary.loss import (
    BEST,
    STATISTICS,
    Head,
    make_buffer,
    score_chunks,
    sum_row_losses,
)
from sparselong.parallel.vocabulary.rows import gather_chunks, gather_labels
from sparselong.parallel.vocabulary.shares import Share


@dataclass(frozen=True)
class ShardedVocabulary(Share):
    """This rank's shard of the vocabulary, in passes in which each rank has rows of its own.

    Attributes:
        rows: tokens of every rank of the group in this pass; None: all have as many as this one.
        chunk_rows: the most rows of each rank whose logits exist at once.
    """

    rows: tuple[int, ...] | None = None
    chunk_rows: int = CHUNK_ROWS

    def embed(self, ids: torch.Tensor, table: torch.Tensor, vocab: int) -> torch.Tensor:
        """Return the embeddings of this process's tokens, [..., width].

        Args:
            ids: int64 [...], as many as `rows` says.
            table: [held, width], this process's rows of the frozen embedding.
            vocab: number of tokens in the vocabulary.

        Returns:
            The rows of the whole table, bit for bit, without a gradient. Each rank sends one row
            for each token of the other ranks.

        Raises:
            ValueError: the arguments are not as above.
            IndexError: on every rank, an id of any rank is outside the vocabulary (on a GPU: a
                device-side assertion).
            ExchangeError: a rank is gone, or did not take part in time.
        """
        self.check_table(table, vocab)
        rank, size = self.placement.rank, self.placement.size
        rows = (ids.numel(),) * size if self.rows is None else self.rows
        if len(rows) != size or rows[rank] != ids.numel():
            raise ValueError(
                f"ids: {ids.numel()} on rank {rank} of {size}; allowed: as in rows, {rows}"
            )
        return embed_rows(ids, table, vocab, self, rows)

    def sum_losses(
        self, hidden: torch.Tensor, table: torch.Tensor, labels: torch.Tensor, vocab: int
    ) -> torch.Tensor:
        """Return the summed cross-entropy of this process's rows that have a label.

        Args:
            hidden: [rows, width], bf16, fp16 or fp32 (fp64 on a CPU); differentiable. Any number of
                rows, on each rank.
            table: [held, width] in hidden's dtype, this process's rows of the frozen lm_head.
            labels: int64 [rows], over the whole vocabulary; -100 excludes a row.
            vocab: number of tokens in the vocabulary.

        Returns:
            fp32 scalar (fp64 from fp64), in nats; 0 if no row of this rank has a label.

        Raises:
            ValueError: an argument is not as above, or on every rank, a label of any rank is
                outside the vocabulary.
            ExchangeError: a rank is gone, or did not take part in time.
        """
        self._check(hidden, table, labels, vocab)
        kept = (labels != IGNORED).nonzero().flatten()
        if len(kept) < len(hidden):
            hidden, labels = hidden.index_select(0, kept), labels[kept]
        needs_gradient = hidden.requires_grad and torch.is_grad_enabled()
        gathered = gather_labels(labels, needs_gradient, vocab, self.group)
        return sum_row_losses(hidden, table, gathered, self._head(vocab))

    @torch.no_grad()
    def score(
        self, hidden: torch.Tensor, table: torch.Tensor, labels: torch.Tensor, vocab: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each row's log-probability of its label, and the token of its largest logit.

        Arguments and errors as for `sum_losses`; every row needs a label.

        Returns:
            (fp32 [rows], fp64 from fp64; int64 [rows], the first of tokens with equal logits).
        """
        self._check(hidden, table, labels, vocab)
        gathered = gather_labels(labels, False, vocab, self.group)
        head = self._head(vocab)
        buffer = make_buffer(hidden, table, gathered.counts, self.chunk_rows)
        chunks = gather_chunks(hidden, gathered, head.rank, self.chunk_rows, self.group)
        return score_chunks(chunks, table, buffer, head, len(hidden))

    @torch.no_grad()
    def compare(
        self, reference: torch.Tensor, hidden: torch.Tensor, table: torch.Tensor, vocab: int
    ) -> Divergence:
        """Return how far the next token is from a reference's, for each row of this process.

        Args:
            reference: [rows, width], the reference's final hidden states; it has the same table.
            hidden: [rows, width], those of the model.
            table: [held, width], this process's rows of the lm_head.
            vocab: number of tokens in the vocabulary.

        Raises:
            ValueError: an argument is not as above.
            ExchangeError: a rank is gone, or did not take part in time.
        """
        labels = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        self._check(hidden, table, labels, vocab)
        self._check(reference, table, labels, vocab)
        gathered = gather_labels(labels, False, vocab, self.group)
        head, pairs = self._head(vocab), torch.cat([reference, hidden], 1)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        nats, agrees = hidden.new_empty(len(hidden), dtype=wide), labels > 0
        for chunk in gather_chunks(pairs, gathered, head.rank, COMPARED_ROWS, self.group):
            both = functional.linear(torch.cat(chunk.rows.chunk(2, 1)), table).chunk(2)
            statistics, best = shard_divergence(both[0], both[1], head.first)
            started = (
                start_all_gather(statistics, self.group, STATISTICS),
                start_all_gather(best, self.group, BEST),
            )
            compared = combine_divergence(*(each.wait() for each in started))
            nats[chunk.place], agrees[chunk.place] = (part[chunk.own] for part in compared)
        return Divergence(nats, agrees)

    def _head(self, vocab: int) -> Head:
        return Head(self.held(vocab).start, self.placement.rank, self.group, self.chunk_rows)

    def _check(
        self, hidden: torch.Tensor, table: torch.Tensor, labels: torch.Tensor, vocab: int
    ) -> None:
        self.check_table(table, vocab)
        check_loss_arguments(hidden, table, labels, self.chunk_rows)
