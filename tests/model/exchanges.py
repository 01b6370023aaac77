"""Exchanges of one process that stands for every rank of an expert group.

Each computes the others' share itself, from the whole layers that the test hands it, so the results
of a partial model equal the whole model's without a second process.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from sparselong.kernels import ExpertStack, PackedWeight
from sparselong.kernels.experts import Adapter, Adapters, expert_mlp
from sparselong.kernels.layer import linear_cross_entropy
from sparselong.parallel.placement import Placement


@dataclass
class FakeExperts:
    """The other ranks' experts come from the whole layer that has the held ones."""

    placement: Placement
    others: list[Any] = field(default_factory=list)

    def held(self, experts: int) -> range:
        return self.placement.experts(experts)

    def run(self, x, indices, weights, stack, adapters, *, experts, alpha, limit):
        held = self.held(experts)
        assert stack.experts == len(held)
        stack = stack.in_place()
        ours, part = stack[0].blocks, slice(held.start, held.stop)
        stacks = (layer.stack() for layer in self.others)
        theirs = next(whole for whole in stacks if torch.equal(whole[0].blocks[part], ours))
        mixed = ExpertStack(
            *(
                PackedWeight(
                    *(
                        torch.cat((far[: held.start], near, far[held.stop :]))
                        for far, near in zip(far_weight, near_weight, strict=True)
                    )
                )
                for far_weight, near_weight in zip(theirs, stack, strict=True)
            )
        )
        padded = Adapters(*(one and _pad(one, held, experts) for one in adapters))
        return expert_mlp(x, indices, weights, mixed, padded, alpha=alpha, limit=limit)


def _pad(adapter: Adapter, held: range, experts: int) -> Adapter:
    """Return the adapter with zeros for the experts of other ranks."""

    def pad(factor: torch.Tensor) -> torch.Tensor:
        before = factor.new_zeros(held.start, *factor.shape[1:])
        after = factor.new_zeros(experts - held.stop, *factor.shape[1:])
        return torch.cat((before, factor, after))

    return Adapter(pad(adapter.a), pad(adapter.b), adapter.scaling)


@dataclass
class FakeVocabulary:
    """The other ranks' rows come from a whole model."""

    placement: Placement
    whole: Any = None

    def held(self, vocab: int) -> range:
        return self.placement.vocabulary(vocab)

    def _fill(self, table: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        held = self.held(len(whole))
        assert len(table) == len(held)
        return torch.cat((whole[: held.start], table, whole[held.stop :]))

    def embed(self, ids, table, vocab):
        whole = self.whole.model.embed_tokens.weight
        assert len(whole) == vocab
        return torch.nn.functional.embedding(ids, self._fill(table, whole))

    def sum_losses(self, hidden, table, labels, vocab):
        whole = self.whole.lm_head.weight.to(table.dtype)
        assert len(whole) == vocab
        return linear_cross_entropy(hidden, self._fill(table, whole), labels)


def exchanges(rank: int, size: int, whole: Any = None) -> dict[str, Any]:
    """Return the settings of one rank of a group; `whole` provides the other ranks' tensors."""
    placement = Placement(rank, size)
    others = [layer.mlp.experts for layer in whole.model.layers] if whole is not None else []
    return {
        "experts": FakeExperts(placement, others),
        "vocabulary": FakeVocabulary(placement, whole),
    }
