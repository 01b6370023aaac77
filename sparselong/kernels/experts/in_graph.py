"""The expert pass as an operator of torch.compile's, forward and backward; see `opaque.py`.

On a GPU gate_up's output is saved, as in a pass that is not checkpointed. The rows are sorted again
in the backward pass, which is one launch, and gate_up's gradient does not overwrite its output,
because an operator changes none of its arguments: tokens * top_k * 2 * inner values more at the
peak than without a compiler. On a CPU the pass is computed again.
"""

from __future__ import annotations

from typing import Any

import torch

from sparselong.kernels.expert_stack import ExpertStack, Gate, PackedWeight
from sparselong.kernels.experts.call import ExpertCall, ExpertOperands, Gradients
from sparselong.kernels.experts.lora import Adapter, Adapters
from sparselong.kernels.experts.op import choose, expert_mlp
from sparselong.kernels.opaque import make_opaque, recompute


def call_operator(
    call: ExpertCall, stack: ExpertStack, adapters: Adapters, gate: Gate
) -> torch.Tensor:
    """Return `expert_mlp` of the arguments, as one node of the graph that is being compiled."""
    factors = [factor for factor in adapters.factors if factor is not None]
    tensors = [*call, *stack.gate_up, *stack.down, *factors]
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    scalings = [None if one is None else float(one.scaling) for one in adapters]
    packed = [*stack.gate_up, *stack.down]
    return _experts_operator(*call, packed, factors, *scalings, list(gate), trains)[0]


def _read_operands(
    packed: list[torch.Tensor], factors: list[torch.Tensor], scalings: tuple[float | None, ...]
) -> tuple[ExpertStack, Adapters]:
    """Return the stack and the adapters that `call_operator` took apart."""
    given = iter(factors)
    adapters = Adapters(
        *(s if s is None else Adapter(next(given), next(given), s) for s in scalings)
    )
    return ExpertStack(PackedWeight(*packed[:3]), PackedWeight(*packed[3:])), adapters


def _experts(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    packed: list[torch.Tensor],
    factors: list[torch.Tensor],
    gate_up_scaling: float | None,
    down_scaling: float | None,
    gate: list[float],
    trains: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weighted sums, and gate_up's output or, where it is not kept, nothing."""
    stack, adapters = _read_operands(packed, factors, (gate_up_scaling, down_scaling))
    if not (trains and is_on_gpu(x) and len(x)):
        alpha, limit = gate
        out = expert_mlp(x, indices, weights, stack, adapters, alpha=alpha, limit=limit)
        shape = _kept_shape(x, indices, packed, trains)
        return out.contiguous(), x.new_empty(shape)
    from sparselong.kernels.experts import triton_launch

    call = ExpertCall(x, indices, weights).contiguous()
    operands = _prepare(call, stack, adapters, Gate(*gate))
    out = torch.empty_like(call.x)
    with torch.cuda.device_of(out):
        gate_up, _ = triton_launch.run_forward(call, operands, out, keep=True)
    assert gate_up is not None
    return out, gate_up


def is_on_gpu(x: torch.Tensor) -> bool:
    """Return whether the Triton backends run, which keep gate_up's output."""
    return x.is_cuda


def _prepare(
    call: ExpertCall, stack: ExpertStack, adapters: Adapters, gate: Gate
) -> ExpertOperands:
    """Check the arguments and return the operands as the kernels take them in training."""
    call.check(stack.experts)
    stack.check(call.x)
    adapters.check(stack)
    name = choose(call.x, call.indices.numel(), stack.experts, None)
    backend = "small" if name == "generation" else name
    return ExpertOperands(stack, adapters, gate, backend).in_dtype(call.x.dtype)


def _kept_shape(
    x: torch.Tensor, indices: torch.Tensor, packed: list[torch.Tensor], trains: bool
) -> tuple[int, ...]:
    if not (trains and is_on_gpu(x)):
        return (0,)
    return indices.shape[0] * indices.shape[1], packed[0].shape[1]


def _like_experts(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    packed: list[torch.Tensor],
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(_kept_shape(x, indices, packed, rest[-1]))


def _differentiate_experts(arguments: Any, results: Any, gradients: Any, needs: Any) -> Any:
    x, indices, weights, packed, factors, *scalings, gate, _ = arguments
    if not is_on_gpu(x) or not len(x):
        return recompute(_experts)(arguments, results, gradients, needs)
    from sparselong.kernels.experts import triton_launch

    stack, adapters = _read_operands(packed, factors, tuple(scalings))
    call = ExpertCall(x, indices, weights).contiguous()
    operands = _prepare(call, stack, adapters, Gate(*gate))
    made = Gradients(
        torch.empty_like(call.x) if needs[0] else None,
        torch.empty_like(call.weights) if needs[2] else None,
        (needs[5], needs[8]),
        adapters.make_sums(),
    )
    with torch.cuda.device_of(x):
        routing = triton_launch.sort_all(call, operands)
        saved = triton_launch.SavedForward(lambda: (results[0], call.x), routing, *call[1:])
        dout = gradients[0].contiguous()
        biases = triton_launch.run_backward(dout, saved, operands, made, overwrite=False)
    sums = [each for each in made.adapters.factors if each is not None]
    return made.x, None, made.weights, None, None, biases[0], None, None, biases[1], *sums


_experts_operator = make_opaque(
    _experts, like=_like_experts, differentiate=_differentiate_experts, reads=(1,)
)
