"""Expert pass in plain torch that decodes one expert at a time: the CPU backend.

Each weight is decoded when needed and then freed, in the forward pass and again in the backward
pass. Any floating dtype works. Finding the experts that have rows synchronizes with the host, so
this backend is slow on a GPU and only used there by name. Adapters are applied alongside.
"""

from __future__ import annotations

from typing import Any

import torch

from sparselong.kernels.expert_stack import PackedWeight
from sparselong.kernels.experts.call import ExpertCall, ExpertOperands
from sparselong.kernels.experts.lora import Adapter
from sparselong.packing import mxfp4


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
    return sum_held_torch(call, operands, range(experts), range(experts))


def sum_held_torch(
    call: ExpertCall, operands: ExpertOperands, held: range, allowed: range
) -> torch.Tensor:
    """Return the held experts' share of each token's weighted sum, [tokens, hidden].

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
    result = torch.zeros_like(x)
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
        weighted = y * weights[token, position, None]
        result = result.index_add(0, token, weighted.to(result.dtype))
    return result
