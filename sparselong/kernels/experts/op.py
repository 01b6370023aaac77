"""gpt-oss's experts over packed MXFP4 weights, forward and backward; no bf16 copy of a layer.

One pass, whether or not the experts have adapters (`lora.py`).

The maths, for a token x with experts e_1 ... e_k of weights w_1 ... w_k:

    [gate, up] = x W_gate_up[e]^T + b_gate_up[e]          gate and up in alternating columns
    h = (clip(up, -limit, limit) + 1) * g * sigmoid(alpha * g),      g = min(gate, limit)
    out = sum_j w_j (h_j W_down[e_j]^T + b_down[e_j])

The weights are frozen; gradients flow to x, the routing weights, the biases and the adapters. Saved
for the backward pass: the output of gate_up, [tokens * k, 2 * inner], and the routing; h is made
again. With adapters x is saved as well, so gate_up's output gives its place to its gradient, and is
made again if the graph is gone through once more. Where no gradient is asked for nothing is saved,
and gate_up's output goes as soon as h is there. Inside a checkpointed layer
(`runtime/recompute.py`) x alone is saved and gate_up's output made again, unless the layer keeps
it. The layer's recomputation then has nothing to compute here, and tokens go through in slices, so
that what is alive at once does not grow with the length.

One function, several backends, all exact to bf16 products with fp32 sums: `packed` decodes weights
in the products, `small` does so with tiles for a few rows, `decode` expands a chunk of experts of
at most 0.25 GiB before multiplying (`triton_launch.py`, `triton_products.py`); `generation` is
forward only, for a few tokens (`kernels/decode/experts.py`); `torch` goes expert by expert, for
CPUs (`torch_backend.py`). The choice follows a measured table by rows an expert (`choice.py`) or is
named by the caller; a named backend that cannot take the call raises. The Triton backends do not
synchronize with the host and give the same bits every time.

MXFP4 is the Open Compute Project's (Microscaling Formats v1.0), the gate gpt-oss's; sorting rows by
expert and one grouped product is what MegaBlocks does (Gale et al., 2022, arXiv:2211.15841). The
code is ours, under this repository's licence. Left out: gradients of the packed weights, fp16.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

from sparselong.kernels.expert_stack import ExpertStack, Gate
from sparselong.kernels.experts import choice as expert_choice
from sparselong.kernels.experts.call import ExpertCall, ExpertOperands
from sparselong.kernels.experts.choice import BACKENDS
from sparselong.kernels.experts.lora import NO_ADAPTERS, Adapters
from sparselong.kernels.experts.torch_backend import expert_mlp_torch
from sparselong.kernels.gpu import architecture_of
from sparselong.runtime import current, is_checkpointed, is_recomputing, keeps_experts

ALPHA, LIMIT = 1.702, 7.0
SLICE_TOKENS = 16_384
"""Tokens that go through at once inside a checkpointed layer."""
MOST_CHOICES = 64
"""Routed tokens that "generation" takes: each goes through its expert's weight by itself."""


def expert_mlp(
    x: torch.Tensor,
    expert_indices: torch.Tensor,
    routing_weights: torch.Tensor,
    stack: ExpertStack,
    adapters: Adapters = NO_ADAPTERS,
    *,
    alpha: float = ALPHA,
    limit: float = LIMIT,
    backend: str | None = None,
) -> torch.Tensor:
    """Weighted sum of the chosen experts' outputs; gradients flow to all but the packed weights.

    Args:
        x: [tokens, hidden], bf16 or fp32 on a GPU, any floating dtype by "torch".
        expert_indices: int32 or int64 [tokens, top_k], each one of [0, experts).
        routing_weights: [tokens, top_k], any floating dtype; its gradient comes back in it.
        stack: the layer's packed weights and biases.
        adapters: low-rank changes of gate_up and down, multiplied beside the weights.
        alpha, limit: of the gate.
        backend: "generation" (at most 64 routed tokens, no adapters, no gradients), "small",
            "packed", "decode" or "torch"; None: the measured table's.

    Returns:
        [tokens, hidden] in x's dtype. Products are taken in x's dtype with fp32 sums; the gradients
        of adapters are summed in fp32 and come back in their dtype.

    The error of the output and of every gradient against fp64 is at most twice that of plain torch
    in the same dtype (tests/gpu/test_expert_gemm.py, test_expert_lora.py).

    Raises:
        ValueError: an argument is not as above; names it, what was found and what is allowed. An
            index out of range is a device-side assertion on a GPU; by "generation", NaN for its
            token.
    """
    call = ExpertCall(x, expert_indices, routing_weights)
    call.check(stack.experts)
    stack.check(x)
    adapters.check(stack)
    name = choose(x, expert_indices, stack.experts, backend)
    operands = ExpertOperands(stack, adapters, Gate(float(alpha), float(limit)), name)
    if backend is None and name == "generation" and not _generates(call, operands):
        operands = operands._replace(backend="small")
    if x.shape[0] == 0:
        return x.clone()
    if operands.backend == "torch":
        return expert_mlp_torch(call, operands)
    call = call.contiguous()
    if operands.backend == "generation":
        return _generate(call, operands)
    if not is_checkpointed() and not _needs_gradient(call, operands):
        return _infer(call, operands)
    return _ExpertPass.apply(operands, *call, *operands.trainable)  # pyright: ignore[reportReturnType]


def _generate(call: ExpertCall, operands: ExpertOperands) -> torch.Tensor:
    from sparselong.kernels.decode import run_generation

    if not _generates(call, operands):
        raise ValueError(
            f"backend: generation with {call.indices.numel()} routed tokens, {call.x.dtype}, "
            f"adapters {'absent' if operands.adapters.are_absent else 'present'}, gradients "
            f"{'asked for' if _needs_gradient(call, operands) else 'off'}; allowed: at most "
            f"{MOST_CHOICES} routed tokens, torch.bfloat16, without adapters, under torch.no_grad()"
        )
    with torch.cuda.device_of(call.x):
        return run_generation(*call, operands.stack, operands.gate)


def _infer(call: ExpertCall, operands: ExpertOperands) -> torch.Tensor:
    from sparselong.kernels.experts import triton_launch as expert_triton

    operands = operands.in_dtype(call.x.dtype)
    out = torch.empty_like(call.x)
    with torch.cuda.device_of(out):
        for part in slices(len(out), current().inference_tokens or len(out)):
            expert_triton.run_forward(call.part(part), operands, out[part], keep=False)
    return out


class _ExpertPass(torch.autograd.Function):
    """The pass by Triton kernels where gradients are asked for or the layer is checkpointed.

    Weights, biases and adapters are referred to, not saved: a step changes what it trains of them
    only after its backward passes. `trainable` repeats those of `operands` that may have gradients:
    autograd sees only tensors that are arguments of their own.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        operands: ExpertOperands,
        x: torch.Tensor,
        indices: torch.Tensor,
        weights: torch.Tensor,
        *trainable: torch.Tensor | None,
    ) -> torch.Tensor:
        from sparselong.kernels.experts import triton_launch as expert_triton

        call, needs = ExpertCall(x, indices, weights), ctx.needs_input_grad
        ctx.operands, ctx.kept = operands, []
        # A bias's gradient is one sum over all tokens.
        is_whole = not is_checkpointed() or any(needs[4:6])
        ctx.slice_tokens = len(x) if is_whole else SLICE_TOKENS
        if is_recomputing():
            ctx.save_for_backward(*call)
            return torch.full_like(x, math.nan)  # a use of it must show
        keeps = any(needs) and (keeps_experts() or not is_checkpointed())
        operands, out = operands.in_dtype(x.dtype), torch.empty_like(x)
        with torch.cuda.device_of(x):
            made: list[Any] = [
                expert_triton.run_forward(call.part(part), operands, out[part], keeps)
                for part in slices(len(x), ctx.slice_tokens)
            ]
        if is_checkpointed() or not operands.adapters.are_absent:
            ctx.save_for_backward(*call)
            ctx.kept = made if keeps else []
        else:
            ((wide, routing),) = made
            ctx.save_for_backward(None, indices, weights, wide, *routing)
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        from sparselong.kernels.experts import triton_launch as expert_triton

        x, indices, weights, *saved = ctx.saved_tensors
        needs, operands = ctx.needs_input_grad, ctx.operands.in_dtype(dout.dtype)
        gradients = expert_triton.Gradients(
            torch.empty_like(dout, memory_format=torch.contiguous_format) if needs[1] else None,
            torch.empty_like(weights) if needs[3] else None,
            needs[4:6],
            ctx.operands.adapters.make_sums(),
        )
        # A pass that breaks off must leave no slice's output for another slice of the next.
        kept, ctx.kept = ctx.kept, []
        if saved:
            kept = [(saved[0], expert_triton.Routing(*saved[1:]))]

        def differentiate(part: slice) -> tuple[torch.Tensor | None, torch.Tensor | None]:
            """One slice's gradients; gate_up's output is gone before the next slice's is made."""
            rows: Any = None if x is None else x[part]
            wide, routing = (
                kept.pop(0) if kept else expert_triton.run_gate_up(rows, indices[part], operands)
            )
            forward = expert_triton.SavedForward(wide, routing, indices[part], weights[part], rows)
            can_be_made_again = rows is not None
            return expert_triton.run_backward(
                dout[part], forward, operands, gradients.part(part), overwrite=can_be_made_again
            )

        with torch.cuda.device_of(dout):
            # Several slices have no gradients of biases.
            biases = [differentiate(part) for part in slices(len(dout), ctx.slice_tokens)][-1]
        factors = [
            None if sums is None else sums.to(factor.dtype)
            for sums, factor in zip(
                gradients.adapters.factors, ctx.operands.adapters.factors, strict=True
            )
        ]
        return None, gradients.x, None, gradients.weights, *biases, *factors


def slices(tokens: int, size: int) -> list[slice]:
    """[0, tokens) in slices of nearly equal length, none longer than `size`."""
    count = -(-tokens // size)
    ends = [tokens * n // count for n in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def choose(x: torch.Tensor, indices: torch.Tensor, experts: int, backend: str | None) -> str:
    """The backend of a call: the named one, or the measured table's.

    Raises:
        ValueError: there is none of that name, or it cannot take the call.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r}; allowed: None, {', '.join(BACKENDS)}")
    if backend is None:
        architecture = architecture_of(x.device)
        backend = expert_choice.choose_backend(architecture, indices.numel(), experts).backend
    if backend == "torch":
        return backend
    if x.device.type != "cuda":
        raise ValueError(f"backend: {backend} with {x.device.type} tensors; allowed: torch")
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"x: {x.dtype}; allowed with {backend}: torch.bfloat16, torch.float32")
    return backend


def _generates(call: ExpertCall, operands: ExpertOperands) -> bool:
    """Return whether the forward-only pass for a few tokens takes the call."""
    few = call.indices.numel() <= MOST_CHOICES and call.x.dtype == torch.bfloat16
    return few and operands.adapters.are_absent and not _needs_gradient(call, operands)


def _needs_gradient(call: ExpertCall, operands: ExpertOperands) -> bool:
    tensors = (call.x, call.weights, *operands.trainable)
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
