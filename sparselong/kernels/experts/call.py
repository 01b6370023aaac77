"""What one pass through the experts takes: its tokens, and what they are multiplied with."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sparselong.kernels.expert_stack import ExpertStack, Gate
from sparselong.kernels.experts.lora import Adapters


class ExpertCall(NamedTuple):
    """Tokens and their routing.

    Attributes:
        x: [tokens, hidden], floating.
        indices: int32 or int64 [tokens, top_k], each token's experts.
        weights: [tokens, top_k], floating, each expert's weight in the token's sum.
    """

    x: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor

    def check(self, experts: int) -> None:
        """Raise if the tensors do not fit one another or a layer of so many experts.

        Raises:
            ValueError: names the argument of `expert_mlp`, what was found and what is allowed.
        """
        x, indices, weights = self
        if x.dim() != 2 or not x.is_floating_point():
            raise ValueError(f"x: {x.dtype} {list(x.shape)}; allowed: floating [tokens, hidden]")
        if indices.dim() != 2 or indices.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"expert_indices: {indices.dtype} {list(indices.shape)}; "
                "allowed: int32 or int64 [tokens, top_k]"
            )
        tokens, top_k = indices.shape
        if tokens != x.shape[0]:
            raise ValueError(f"expert_indices: {tokens} tokens; allowed: x's {x.shape[0]}")
        if not 0 < top_k <= experts:
            raise ValueError(
                f"expert_indices: {top_k} experts a token; allowed: 1 to the layer's {experts}"
            )
        if weights.shape != indices.shape or not weights.is_floating_point():
            raise ValueError(
                f"routing_weights: {weights.dtype} {list(weights.shape)}; "
                f"allowed: floating {list(indices.shape)}"
            )
        for name, tensor in (("expert_indices", indices), ("routing_weights", weights)):
            if tensor.device != x.device:
                raise ValueError(f"{name}: on {tensor.device}; allowed: x's device, {x.device}")

    def contiguous(self) -> ExpertCall:
        """The same with every tensor contiguous, as the kernels read them."""
        return ExpertCall(*(tensor.contiguous() for tensor in self))

    def part(self, tokens: slice) -> ExpertCall:
        """Some of the tokens; views."""
        return ExpertCall(*(tensor[tokens] for tensor in self))


class ExpertOperands(NamedTuple):
    """Everything that a pass takes beside its tokens.

    Attributes:
        stack: the packed weights.
        adapters: low-rank changes of them.
        gate: the gate's constants.
        backend: the name of the one that multiplies.
    """

    stack: ExpertStack
    adapters: Adapters
    gate: Gate
    backend: str

    @property
    def trainable(self) -> tuple[torch.Tensor | None, ...]:
        """The biases of gate_up and down, A and B of gate_up, A and B of down: all that may have a
        gradient."""
        return (self.stack.gate_up.bias, self.stack.down.bias, *self.adapters.factors)

    def in_dtype(self, dtype: torch.dtype) -> ExpertOperands:
        """The same with the adapters as the kernels read them beside rows of `dtype`."""
        return self._replace(adapters=self.adapters.in_dtype(dtype))
