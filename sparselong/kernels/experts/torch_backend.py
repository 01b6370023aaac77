"""Expert pass in plain torch that decodes one expert at a time: the CPU backend.

Each weight is decoded when needed and then freed, in the forward pass and again in the backward
pass. Any floating dtype works. Finding the experts that have rows synchronizes with the host, so
this backend is slow on a GPU and only used there by name. Adapters are applied alongside.
"""

from __future__ import annotations

from typing import Any

import torch

from sparselong.kernels.expert_stack import PackedWeight
from sparselong.kernels.experts.call import ExpertCall, ExpertOperands, Gradients
from sparselong.kernels.experts.lora import Adapter, Adapters
from sparselong.packing import mxfp4
from sparselong.runtime import is_checkpointed, is_recomputing, unused_output


class _FrozenProduct(torch.autograd.Function):
    """x Wᵀ + bias with W decoded from (blocks, scales) in either pass."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: torch.Tensor, blocks: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(blocks, scales)
        return torch.nn.functional.linear(x, mxfp4.decode(blocks, scales, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        blocks, scales = ctx.saved_tensors
        needs_x, needs_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        dx = dout @ mxfp4.decode(blocks, scales, dout.dtype) if needs_x else None
        return dx, None, None, dout.sum(0) if needs_bias else None


def apply_gate(gate_up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """Clamped SwiGLU over interleaved columns: (up + 1) · gate · σ(alpha · gate).

    [..., 2 * inner] → [..., inner].
    """
    gate = gate_up[..., ::2].clamp(max=limit)
    up = gate_up[..., 1::2].clamp(min=-limit, max=limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


def _split(adapter: Adapter | None, dtype: torch.dtype) -> Any:
    """Split an adapter's factors by expert, in `dtype`; keep its scale."""
    if adapter is None:
        return None
    a, b, scaling = adapter
    return a.to(dtype).unbind(), b.to(dtype).unbind(), scaling


def _multiply(rows: torch.Tensor, weight: PackedWeight, adapter: Any, expert: int) -> torch.Tensor:
    out: Any = _FrozenProduct.apply(rows, *(tensor[expert] for tensor in weight))
    if adapter is None:
        return out
    a, b, scaling = adapter
    return out + scaling * ((rows @ a[expert].T) @ b[expert].T)


def expert_mlp_torch(call: ExpertCall, operands: ExpertOperands) -> torch.Tensor:
    """Return the weighted sum of the outputs of each token's experts, [tokens, hidden].

    Raises:
        ValueError: An index is outside [0, experts).
    """
    experts = operands.stack.experts
    return sum_held_torch(call, operands, range(experts), range(experts)).to(call.x.dtype)


def sum_held_torch(
    call: ExpertCall, operands: ExpertOperands, held: range, allowed: range
) -> torch.Tensor:
    """Return the held experts' share of each token's weighted sum, [tokens, hidden].

    It is in fp32, or in fp64 if x is, and unrounded.

    Args:
        call: its indices are those of the layer's experts.
        operands: weights and adapters of the held experts, in order.
        held: which of the layer's experts those are.
        allowed: the values that an index may have.

    Raises:
        ValueError: An index is not allowed.
    """
    x, indices, weights = call
    stack, adapters, gate, _ = operands
    wide = torch.promote_types(x.dtype, torch.float32)
    result = torch.zeros_like(x, dtype=wide)
    gate_up_adapter, down_adapter = (_split(adapter, x.dtype) for adapter in adapters)
    for expert in torch.unique(indices).tolist():
        if expert not in allowed:
            raise ValueError(
                f"expert_indices: holds {expert}; allowed: {allowed.start} to {allowed.stop - 1}"
            )
        if expert not in held:
            continue
        token, position = torch.where(indices == expert)
        local = expert - held.start
        gate_up = _multiply(x[token], stack.gate_up, gate_up_adapter, local)
        y = _multiply(apply_gate(gate_up, *gate), stack.down, down_adapter, local)
        weighted = y.to(wide) * weights[token, position, None]
        result = result.index_add(0, token, weighted.to(wide))
    return result


def differentiate_torch(
    dout: torch.Tensor,
    call: ExpertCall,
    operands: ExpertOperands,
    held: range,
    gradients: Gradients,
    experts: int,
) -> None:
    """Fill `gradients` by autograd over `sum_held_torch`; arguments as in `differentiate_held`."""

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1]

    leaves: list[torch.Tensor] = []
    call = call._replace(x=leaf(call.x), weights=leaf(call.weights))
    adapters = Adapters(
        *(one and one._replace(a=leaf(one.a), b=leaf(one.b)) for one in operands.adapters)
    )
    operands = operands._replace(adapters=adapters)
    with torch.enable_grad():
        out = sum_held_torch(call, operands, held, range(-1, experts))
        # Adds nothing, but connects every leaf, which may have no part in the sum.
        out = out + sum((part.flatten()[:0].sum() for part in leaves), start=0.0)
    x, weights, *factors = torch.autograd.grad(out, leaves, dout.to(out.dtype))
    for target, gradient in ((gradients.x, x), (gradients.weights, weights)):
        if target is not None:
            target.copy_(gradient)
    sums = [one for one in gradients.adapters.factors if one is not None]
    for target, gradient in zip(sums, factors, strict=True):
        target += gradient


class _StreamedPass(torch.autograd.Function):
    """The pass over experts in host memory, which are fetched again in the backward pass.

    That recomputes the products: nothing of a fetched layer may be kept until then. `factors`
    repeats the adapters' tensors, because autograd tracks only tensors passed as separate
    arguments.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        operands: ExpertOperands,
        x: torch.Tensor,
        indices: torch.Tensor,
        weights: torch.Tensor,
        *factors: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.operands = operands
        ctx.save_for_backward(x, indices, weights)
        if is_recomputing():
            return unused_output(x)
        is_followed = any(ctx.needs_input_grad) or is_checkpointed()  # by a backward pass
        passing = "forward" if is_followed else "inference"
        return expert_mlp_torch(ExpertCall(x, indices, weights), operands.fetch(passing))

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        call, needs = ExpertCall(*ctx.saved_tensors), ctx.needs_input_grad
        operands = ctx.operands.fetch("backward")
        sums = operands.adapters.make_sums()
        gradients = Gradients(
            torch.empty_like(call.x), torch.empty_like(call.weights), adapters=sums
        )
        experts = operands.stack.experts
        differentiate_torch(dout, call, operands, range(experts), gradients, experts)
        factors = [
            None if total is None else total.to(factor.dtype)
            for total, factor in zip(sums.factors, operands.adapters.factors, strict=True)
        ]
        dx = gradients.x if needs[1] else None
        return None, dx, None, gradients.weights if needs[3] else None, *factors


def stream_torch(call: ExpertCall, operands: ExpertOperands) -> torch.Tensor:
    """Return what `expert_mlp_torch` does, differentiable, for experts in host memory.

    Raises:
        ValueError: a bias requires a gradient.
    """
    if any(bias.requires_grad for bias in operands.trainable[:2] if bias is not None):
        raise ValueError(
            "stack: a bias requires a gradient; allowed for experts in host memory: frozen biases"
        )
    return _StreamedPass.apply(operands, *call, *operands.adapters.factors)  # pyright: ignore[reportReturnType]
