"""Arguments of one expert pass: routed tokens, weights and settings, and gradients to fill."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sparselong.kernels.expert_stack import ExpertStack, Gate, HostStack, Passing
from sparselong.kernels.experts.lora import NO_ADAPTERS, Adapters

_READ_CHOSEN = ("generation", "small", "torch")
"""Backends that read no expert without rows, and others' weights once or nearly so."""


class ExpertCall(NamedTuple):
    """Tokens and their routing.

    Attributes:
        x: [tokens, hidden], floating.
        indices: int32 or int64 [tokens, top_k], the experts that each token is routed to.
        weights: [tokens, top_k], floating, each expert's weight in the token's sum.
    """

    x: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor

    def check(self, experts: int) -> None:
        """Raise if the tensors do not match each other or a layer with `experts` experts.

        Raises:
            ValueError: A tensor does not fit; the message names the argument of `expert_mlp`.
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
                f"expert_indices: {top_k} experts per token; allowed: 1 to the layer's {experts}"
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
        """Return the call with contiguous tensors, as the kernels require."""
        return ExpertCall(*(tensor.contiguous() for tensor in self))

    def part(self, tokens: slice) -> ExpertCall:
        """Return the call for a slice of the tokens; the tensors are views."""
        return ExpertCall(*(tensor[tokens] for tensor in self))


class ExpertOperands(NamedTuple):
    """Arguments of an expert pass other than its tokens.

    Attributes:
        stack: the packed weights, on the device or in host memory.
        adapters: low-rank adapters of the weights.
        gate: the gate's constants.
        backend: name of the backend that runs the products.
    """

    stack: ExpertStack | HostStack
    adapters: Adapters
    gate: Gate
    backend: str

    @property
    def trainable(self) -> tuple[torch.Tensor | None, ...]:
        """Tensors that may require gradients: both biases, A and B of gate_up, A and B of down."""
        return (self.stack.gate_up.bias, self.stack.down.bias, *self.adapters.factors)

    def fetch(self, passing: Passing) -> ExpertOperands:
        """Return the operands with the stack on the device; valid until the next layer's."""
        return self._replace(stack=self.stack.fetch(passing))

    def fetch_or_read(self, routed_tokens: int, experts: int) -> ExpertOperands:
        """Return the operands for a pass without gradients.

        If the routed tokens are no more than the layer's experts, and the backend reads only the
        experts that they are routed to, these are read where they lie: fewer bytes than a layer.
        """
        if routed_tokens <= experts and self.backend in _READ_CHOSEN:
            return self._replace(stack=self.stack.in_place())
        return self.fetch("inference")

    def in_dtype(self, dtype: torch.dtype) -> ExpertOperands:
        """Return the operands with the adapters as the kernels read them for rows of `dtype`."""
        return self._replace(adapters=self.adapters.in_dtype(dtype))


class Gradients(NamedTuple):
    """Gradients that a backward pass computes, and the tensors that receive them.

    Attributes:
        x: [tokens, hidden], contiguous, overwritten; None if not needed.
        weights: [tokens, top_k], likewise.
        biases: whether the gradients of gate_up's and down's bias are needed.
        adapters: sums of the factors' shapes as `Adapters.make_sums` returns, accumulated into.
    """

    x: torch.Tensor | None
    weights: torch.Tensor | None
    biases: tuple[bool, bool] = (False, False)
    adapters: Adapters = NO_ADAPTERS

    def part(self, tokens: slice) -> Gradients:
        """Return the gradients for a slice of the tokens; the tensors are views."""
        x, weights = (None if tensor is None else tensor[tokens] for tensor in self[:2])
        return self._replace(x=x, weights=weights)
