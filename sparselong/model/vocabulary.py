"""Embedding and lm_head of which a process holds some rows, and an lm_head that sums losses.

The first two take the place of transformers' modules in a model that is opened inside
`using(vocabulary=...)`, and are frozen. What needs rows of other processes is done by the setting's
exchange. `num_embeddings`, `out_features` and the configuration name the whole vocabulary.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn import functional

from sparselong.kernels import leave_graph
from sparselong.kernels.layer import combine_statistics, linear_cross_entropy, shard_statistics
from sparselong.model.part import Part, show_rows
from sparselong.runtime import current

_CHUNK_ROWS = 512
"""Rows whose logits exist at once, if a process holds the whole lm_head."""

_WHY = "the vocabulary is sharded over several processes, whose exchange is not part of a graph"


class _VocabularyPart(Part):
    """Rows `held` of a table [vocab, width].

    Args:
        held: the rows.
        vocab: number of rows of the whole table.
        width: columns.
    """

    def __init__(self, held: range, vocab: int, width: int):
        super().__init__(held, vocab)
        self.weight = nn.Parameter(torch.empty(len(held), width), requires_grad=False)

    def _exchange(self) -> Any:
        """Return the pass's exchange; raise ValueError unless it is that of these rows."""
        exchange = current().vocabulary
        self.check_setting("vocabulary", exchange)
        return exchange

    def extra_repr(self) -> str:
        """Return the held rows for the module's repr."""
        return f"rows {show_rows(self.held)} of {self.total}"


class PartialEmbedding(_VocabularyPart):
    """Embedding that holds some of the vocabulary's rows."""

    def __init__(self, held: range, vocab: int, width: int):
        super().__init__(held, vocab, width)
        self.num_embeddings, self.embedding_dim = vocab, width

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of any tokens, [..., width]; collective.

        Raises:
            ValueError: the pass runs outside `using(vocabulary=...)`, or in that of other rows.
        """
        if torch.compiler.is_compiling():
            return self._embed(input_ids)
        return self._exchange().embed(input_ids, self.weight, self.total)

    @leave_graph(_WHY)
    def _embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.forward(input_ids)


class PartialHead(_VocabularyPart):
    """lm_head that holds some of the vocabulary's rows; it never returns full logits."""

    def __init__(self, held: range, vocab: int, width: int):
        super().__init__(held, vocab, width)
        self.in_features, self.out_features = width, vocab

    def sum_losses(
        self, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Return the summed cross-entropy of this process's rows; collective.

        Args:
            hidden: [rows, width].
            weight: this module's weight, in the dtype of the products.
            labels: int64 [rows], -100 is ignored.

        Raises:
            ValueError: the pass runs outside `using(vocabulary=...)`, or in that of other rows.
        """
        if torch.compiler.is_compiling():
            return self._sum_losses(hidden, weight, labels)
        return self._exchange().sum_losses(hidden, weight, labels, self.total)

    @leave_graph(_WHY)
    def _sum_losses(self, *arguments: torch.Tensor) -> torch.Tensor:
        return self.sum_losses(*arguments)

    def forward(self, hidden: torch.Tensor) -> NoReturn:
        """Refuse to compute logits.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"lm_head: holds the rows {show_rows(self.held)} of {self.total}, so there are no full "
            "logits; allowed: the loss of a model after sparselong.model.chunk_loss(model), or "
            "runtime.current().vocabulary.score on the hidden states of model.model"
        )


class ChunkedHead(nn.Linear):
    """lm_head that sums losses when it is called: FSDP and ZeRO-3 gather weights only for calls."""

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits; with labels, int64 [rows], the summed loss of [rows, width] instead."""
        return super().forward(hidden) if labels is None else sum_losses(self, hidden, labels)


def sum_losses(
    head: nn.Linear | PartialHead, hidden: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Return the summed cross-entropy of rows, in autocast's dtype if there is one.

    Args:
        head: lm_head, or the part of it that this process holds; then the call is collective.
        hidden: [rows, width].
        labels: int64 [rows], -100 is ignored.
    """
    weight = head.weight
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    compute = head.sum_losses if isinstance(head, PartialHead) else linear_cross_entropy
    return compute(hidden, weight, labels)


def divide_vocabulary(model: nn.Module) -> None:
    """Replace a model's embedding and lm_head by the parts that `using(vocabulary=...)` says.

    Without the setting, or if this process holds all rows, they are left as they are.
    """
    exchange = current().vocabulary
    if exchange is None:
        return
    whole: Any = model
    embedding, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    rows, width = embedding.weight.shape
    held = exchange.held(rows)
    if len(held) == rows:
        return
    whole.set_input_embeddings(PartialEmbedding(held, rows, width))
    if head is not None:
        whole.set_output_embeddings(PartialHead(held, rows, width))


def score_tokens(
    head: Any, states: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's log-probability of its target, and the token of its largest logit.

    Args:
        head: lm_head, or the part of it that this process holds; then the call is collective.
        states: [rows, width], final hidden states.
        targets: int64 [rows].
    """
    if isinstance(head, PartialHead):
        exchange: Any = current().vocabulary
        return exchange.score(states, head.weight, targets, head.total)
    parts = []
    for rows, labels in zip(states.split(_CHUNK_ROWS), targets.split(_CHUNK_ROWS), strict=True):
        logits = functional.linear(rows, head.weight)
        losses, _ = combine_statistics(shard_statistics(logits, labels, 0)[None])
        parts.append((-losses, logits.argmax(1)))
    scores, best = zip(*parts, strict=True)
    return torch.cat(scores), torch.cat(best)
