"""Which experts of a layer are kept, by REAP's criterion, and what is left of the layer.

An expert's score is the mean, over the calibration tokens that are routed to it, of the routing
weight times the norm of the expert's output (Lasby et al., 2025, arXiv:2510.13999): what the
layer's output loses where the expert is missing. The experts with the highest scores are kept, in
their order. An expert that no token reaches has no score and ranks last; of equal ones the first is
kept.

The norm needs each expert's output before it is weighted. The experts' own operation gives that for
routed tokens that are passed as tokens of their own, each with one expert and the weight 1: the
same products as in the layer, none of them twice. Tokens are taken a few thousand at a time, so
memory does not grow with their number. Each token's product is rounded to fp32, and they are summed
in fp64: that is exact unless one is 2^29 times smaller than the sum, so scores depend neither on
the order of the tokens nor on how they are divided.

The layer runs with its attention already compressed. The router loses the rows of the dropped
experts, so the tokens that they had are routed to others; later layers are compressed on what comes
of that. Left out: merging experts, other numbers in other layers, correcting the router.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from sparselong.checkpoint import has_expert_rows, show_ranges
from sparselong.errors import StageError
from sparselong.kernels import ExpertStack
from sparselong.kernels.experts import expert_mlp, slices
from sparselong.model import PackedExperts

_TOKENS_AT_ONCE = 4096
WARNING = (
    "experts.keep is experimental: the model loses whole experts, chosen by the calibration text "
    "alone; measure what it lost (04_eval.py)"
)


class Scorer(nn.Module):
    """Stands in for a layer's experts: scores them on every call, and returns zeros.

    Args:
        experts: of one layer, all on its device.

    Attributes:
        sums: fp64 [3, experts]: the number of routed tokens, their weights, and their weights times
            the norms of the experts' outputs.
    """

    sums: torch.Tensor

    def __init__(self, experts: PackedExperts):
        super().__init__()
        stack = experts.stack()
        assert isinstance(stack, ExpertStack)
        self._operation = partial(expert_mlp, stack=stack, alpha=experts.alpha, limit=experts.limit)
        self.sums = torch.zeros(3, experts.num_experts, dtype=torch.float64)

    def forward(
        self, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Add what tokens [tokens, hidden] say of the experts; see `PackedExperts.forward`."""
        for part in slices(len(hidden_states), _TOKENS_AT_ONCE):
            self._add(hidden_states[part], indices[part], weights[part])
        return torch.zeros_like(hidden_states)

    def _add(self, x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> None:
        single = indices.reshape(-1, 1)
        each = torch.ones_like(single, dtype=weights.dtype)
        rows = self._operation(x.repeat_interleave(indices.shape[1], 0), single, each)
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).cpu()
        chosen, weighed = single.flatten().cpu(), weights.flatten().double().cpu()
        products = (weighed * norms).float().double()
        for sums, values in zip(
            self.sums, (torch.ones_like(norms), weighed, products), strict=True
        ):
            sums += torch.bincount(chosen, values, len(sums))


class Choice(NamedTuple):
    """The experts of a layer that are kept.

    Attributes:
        kept: their indices, ascending.
        scores: of every expert of the layer; None of those that no token reached.
        lost_weight: sum of the routing weights of the dropped experts, as a share of all.
    """

    kept: list[int]
    scores: list[float | None]
    lost_weight: float

    @property
    def unreached(self) -> int:
        """Number of experts that no calibration token was routed to."""
        return self.scores.count(None)

    def select(
        self, left: Mapping[str, torch.Tensor], packed: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return the kept experts' tensors to store.

        Args:
            left: what `CalibratedLayer.keep_experts` returns.
            packed: tensors to store instead of some of these, with rows of all experts: 2:4 forms.
        """
        rows = {n: tensor[self.kept] for n, tensor in packed.items() if has_expert_rows(n)}
        stems = {name.removesuffix("_kept") for name in rows}
        return rows | {n: t for n, t in left.items() if n.removesuffix("_blocks") not in stems}

    def describe(self) -> dict[str, Any]:
        """Return the choice as compact JSON: scores, in the experts' order, as text."""
        shown = ("-" if score is None else f"{score:.4g}" for score in self.scores)
        return {
            "kept": show_ranges(self.kept),
            "scores": " ".join(shown),
            "unreached": self.unreached,
            "lost_weight": self.lost_weight,
        }


def choose(sums: torch.Tensor, keep: int, layer: int) -> Choice:
    """Return which experts are kept.

    Args:
        sums: as `Scorer` has them.
        keep: number of experts to keep, at most as many as there are.
        layer: the layer's index, for messages.

    Raises:
        StageError: a sum is not finite.
    """
    if not bool(torch.isfinite(sums).all()):
        raise StageError(
            f"scoring the experts of layer {layer} failed",
            "finite outputs of all experts",
            f"NaN or infinity in those of {int((~torch.isfinite(sums)).any(0).sum())} experts",
            "check the base checkpoint; raise calibration.dampening if it is intact",
        )
    tokens, weights, norms = sums.tolist()
    scores = [norm / count if count else None for count, norm in zip(tokens, norms, strict=True)]
    ranks = [-1.0 if score is None else score for score in scores]
    order = sorted(range(len(ranks)), key=lambda expert: (-ranks[expert], expert))
    kept, dropped = sorted(order[:keep]), order[keep:]
    lost = sum(weights[expert] for expert in sorted(dropped)) / sum(weights)
    return Choice(kept, scores, lost)


def tell(choice: Choice, layer: int, log: Callable[[str], None]) -> None:
    """Log what a layer keeps and loses, with a warning if experts were kept without a score."""
    kept, count = len(choice.kept), len(choice.scores)
    unreached = choice.unreached
    text = f"layer {layer}: {kept} of {count} experts kept"
    text += f", the others had {choice.lost_weight:.1%} of the routing weight"
    log(text + (f"; {unreached} were reached by no calibration token" if unreached else ""))
    if count - unreached < kept:
        log(
            f"warning: layer {layer}: calibration reached only {count - unreached} experts, so "
            f"{kept - count + unreached} were kept without a score: use more calibration text"
        )


def summarize(records: list[dict[str, Any]], keep: int | None) -> dict[str, Any]:
    """Return what the manifest says of the experts that were kept; nothing if all were.

    Args:
        records: the layers' records, each with `Choice.describe` as `experts`.
        keep: the config's `experts.keep`.
    """
    if keep is None:
        return {}
    layers = [record["experts"] for record in records]
    base = len(layers[0]["scores"].split())
    lost = sum(layer["lost_weight"] for layer in layers) / len(layers)
    found = {"experts": keep, "base": base, "lost_weight": lost, "layers": layers}
    return {"kept_experts": found}
