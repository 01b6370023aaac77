"""gpt-oss's experts over packed MXFP4 weights, forward and backward; no bf16 copy of a layer.

The same pass serves experts with and without adapters (`lora.py`).

For a token x routed to experts e_1 ... e_k with weights w_1 ... w_k:

    [gate, up] = x W_gate_up[e]^T + b_gate_up[e]          gate and up in alternating columns
    h = (clip(up, -limit, limit) + 1) * g * sigmoid(alpha * g),      g = min(gate, limit)
    out = sum_j w_j (h_j W_down[e_j]^T + b_down[e_j])

and the layer's residual is added to out in the kernel that takes the sum. The weights are frozen;
gradients flow to x, the routing weights, the residual, the biases and the adapters. Saved
for the backward pass: the output of gate_up, [tokens * k, 2 * inner], and the routing; h is
recomputed. With adapters x is saved as well; gate_up's gradient then overwrites gate_up's output,
which is recomputed if backward runs again. If no gradient is needed nothing is saved, and gate_up's
output is freed as soon as h exists. Inside a checkpointed layer (`runtime/recompute.py`) only the
call's inputs are saved and gate_up's output is recomputed, unless the layer keeps it. The layer's
recomputation then computes nothing here, and tokens are processed in slices, so peak memory does
not grow with the length. Where later layers have freed what they kept, "decode" decodes gate_up's
weights once for the recomputation and the backward pass.

One function, several backends, all exact up to bf16 products with fp32 sums: `packed` decodes
weights inside the products, `small` does the same with tiles for a few rows, `decode` expands a
chunk of experts of at most 0.25 GiB before multiplying (`triton_launch.py`, `triton_products.py`);
`generation` is forward-only, for a few tokens (`kernels/decode/experts.py`); `torch` processes one
expert at a time, for CPUs (`torch_backend.py`). A measured table selects the backend by rows per
expert (`choice.py`), or the caller names one; a named backend that cannot take the call raises. The
Triton backends do not synchronize with the host and are bitwise reproducible. The error of output
and gradients against fp64 is at most twice that of plain torch in the same dtype
(tests/gpu/test_experts.py, test_expert_lora.py).

MXFP4 is the Open Compute Project's (Microscaling Formats v1.0), the gate is gpt-oss's; sorting rows
by expert for one grouped product follows MegaBlocks (Gale et al., 2022, arXiv:2211.15841). The code
is ours, under this repository's licence. Not supported: gradients of the packed weights, fp16.
Processes that hold only some of the experts use the passes of `held.py`.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from sparselong.kernels.expert_stack import ExpertStack, Gate, HostStack
from sparselong.kernels.experts import choice
from sparselong.kernels.experts.call import ExpertCall, ExpertOperands
from sparselong.kernels.experts.choice import BACKENDS
from sparselong.kernels.experts.lora import NO_ADAPTERS, Adapters
from sparselong.kernels.experts.torch_backend import expert_mlp_torch, stream_torch
from sparselong.kernels.gpu import architecture_of
from sparselong.runtime import (
    current,
    freed_outputs,
    is_checkpointed,
    is_recomputing,
    keeps_experts,
    unused_output,
)

ALPHA, LIMIT = 1.702, 7.0
SLICE_TOKENS = 16_384
"""Most tokens per slice inside a checkpointed layer."""
MOST_CHOICES = 64
"""Most routed tokens for "generation", which reads an expert's weight once per routed token."""


def expert_mlp(
    x: torch.Tensor,
    expert_indices: torch.Tensor,
    routing_weights: torch.Tensor,
    stack: ExpertStack | HostStack,
    adapters: Adapters = NO_ADAPTERS,
    *,
    residual: torch.Tensor | None = None,
    alpha: float = ALPHA,
    limit: float = LIMIT,
    backend: str | None = None,
) -> torch.Tensor:
    """Return the weighted sum of each token's expert outputs, [tokens, hidden] in x's dtype.

    Gradients flow to all inputs but the packed weights; those of adapters are summed in fp32.

    Args:
        x: [tokens, hidden], bf16 or fp32 on a GPU, any floating dtype with "torch".
        expert_indices: int32 or int64 [tokens, top_k], values in [0, experts).
        routing_weights: [tokens, top_k], any floating dtype; its gradient has the same dtype.
        stack: the layer's packed weights and biases, on the device or in host memory.
        adapters: low-rank adapters of gate_up and down, applied alongside the weights.
        residual: in x's shape and dtype; added to the sum, which is rounded before and after.
        alpha: factor of the gate inside the sigmoid.
        limit: bound that clips gate and up.
        backend: one of `BACKENDS`; None selects by the measured table. "generation" takes at most
            64 routed tokens, no adapters and no gradients.

    Raises:
        ValueError: An argument does not fit; the message names it. An index out of range fails a
            device-side assertion on a GPU; with "generation" its token becomes NaN.
    """
    call = ExpertCall(x, expert_indices, routing_weights)
    if torch.compiler.is_compiling() and backend is None and isinstance(stack, ExpertStack):
        return _run_in_graph(call, stack, adapters, residual, Gate(float(alpha), float(limit)))
    _check(call, stack, adapters, residual)
    name = choose(x, expert_indices.numel(), stack.experts, backend)
    operands = ExpertOperands(stack, adapters, Gate(float(alpha), float(limit)), name)
    if backend is None and name == "generation" and not _can_generate(call, operands):
        operands = operands._replace(backend="small")
    if x.shape[0] == 0:
        out = x.clone()
    elif operands.backend == "torch":
        out = _run_torch(call, operands)
    elif operands.backend == "generation":
        out = _generate(call.contiguous(), operands)
    else:
        return _run_triton(call.contiguous(), operands, residual)
    return out if residual is None else residual + out


def _run_in_graph(
    call: ExpertCall,
    stack: ExpertStack,
    adapters: Adapters,
    residual: torch.Tensor | None,
    gate: Gate,
) -> torch.Tensor:
    from sparselong.kernels.experts.in_graph import call_operator

    out = call_operator(call, stack, adapters, gate)
    return out if residual is None else residual + out


def _check(
    call: ExpertCall,
    stack: ExpertStack | HostStack,
    adapters: Adapters,
    residual: torch.Tensor | None,
) -> None:
    call.check(stack.experts)
    stack.check(call.x)
    adapters.check(stack)
    x = call.x
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"residual: {residual.dtype} {list(residual.shape)}; allowed: x's {x.dtype} "
            f"{list(x.shape)}"
        )


def _run_torch(call: ExpertCall, operands: ExpertOperands) -> torch.Tensor:
    if isinstance(operands.stack, ExpertStack):
        return expert_mlp_torch(call, operands)
    call = call.contiguous()
    if is_checkpointed() or _needs_gradient(call, operands):
        return stream_torch(call, operands)
    fetched = operands.fetch_or_read(call.indices.numel(), operands.stack.experts)
    return expert_mlp_torch(call, fetched)


def _run_triton(
    call: ExpertCall, operands: ExpertOperands, residual: torch.Tensor | None
) -> torch.Tensor:
    residual = None if residual is None else residual.contiguous()
    if is_checkpointed() or _needs_gradient(call, operands, residual):
        return _ExpertPass.apply(operands, residual, *call, *operands.trainable)  # pyright: ignore[reportReturnType]
    fetched = operands.fetch_or_read(call.indices.numel(), operands.stack.experts)
    return _infer(call, fetched, residual)


def _generate(call: ExpertCall, operands: ExpertOperands) -> torch.Tensor:
    from sparselong.kernels.decode import run_generation

    if not _can_generate(call, operands):
        raise ValueError(
            f"backend: generation with {call.indices.numel()} routed tokens, {call.x.dtype}, "
            f"adapters {'absent' if operands.adapters.are_absent else 'present'}, gradients "
            f"{'required' if _needs_gradient(call, operands) else 'off'}; allowed: at most "
            f"{MOST_CHOICES} routed tokens, torch.bfloat16, without adapters, under torch.no_grad()"
        )
    with torch.cuda.device_of(call.x):
        return run_generation(*call, operands.stack.in_place(), operands.gate)


def _infer(
    call: ExpertCall, operands: ExpertOperands, residual: torch.Tensor | None
) -> torch.Tensor:
    from sparselong.kernels.experts import triton_launch

    operands = operands.in_dtype(call.x.dtype)
    out = torch.empty_like(call.x)
    with torch.cuda.device_of(out):
        for part in slices(len(out), current().inference_tokens or len(out)):
            added = None if residual is None else residual[part]
            triton_launch.run_forward(
                *(call.part(part), operands, out[part]), keep=False, exact=True, residual=added
            )
    return out


class _ExpertPass(torch.autograd.Function):
    """Expert pass in Triton, for calls that need gradients and for checkpointed layers.

    Experts in host memory are fetched in either pass. Weights, biases and adapters are referenced,
    not saved: the optimizer changes them only after a step's backward passes. `trainable` repeats
    the tensors of `operands` that may require gradients, because autograd tracks only tensors
    passed as separate arguments.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        operands: ExpertOperands,
        residual: torch.Tensor | None,
        x: torch.Tensor,
        indices: torch.Tensor,
        weights: torch.Tensor,
        *trainable: torch.Tensor | None,
    ) -> torch.Tensor:
        from sparselong.kernels.experts import triton_launch

        call, needs = ExpertCall(x, indices, weights), ctx.needs_input_grad
        ctx.operands, ctx.kept, ctx.decodes_once = operands, [], False
        # A bias's gradient is a single sum over all tokens, so slices cannot produce it.
        is_whole = not is_checkpointed() or any(needs[5:7])
        ctx.slice_tokens = len(x) if is_whole else SLICE_TOKENS
        if is_recomputing():
            ctx.save_for_backward(*call)
            return unused_output(x)
        keeps = any(needs) and (keeps_experts() or not is_checkpointed())
        operands, out = operands.in_dtype(x.dtype), torch.empty_like(x)
        is_followed = any(needs) or is_checkpointed()  # by a backward pass
        operands = operands.fetch("forward" if is_followed else "inference")
        ctx.decodes_once = not keeps and _decodes_once(call, operands)
        with torch.cuda.device_of(x):
            made: list[Any] = []
            for part in slices(len(x), ctx.slice_tokens):
                added = None if residual is None else residual[part]
                given = (call.part(part), operands, out[part], keeps)
                made.append(triton_launch.run_forward(*given, residual=added))
        if is_checkpointed() or not operands.adapters.are_absent:
            ctx.save_for_backward(*call)
            ctx.kept = made  # at least the rows' order, 4 bytes a routed token
        else:
            ((gate_up, routing),) = made
            ctx.save_for_backward(None, indices, weights, gate_up, *routing.tensors)
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        from sparselong.kernels.experts import triton_launch

        x, indices, weights, *saved = ctx.saved_tensors
        needs, operands = ctx.needs_input_grad, ctx.operands.in_dtype(dout.dtype)
        operands = operands.fetch("backward")
        gradients = triton_launch.Gradients(
            torch.empty_like(dout, memory_format=torch.contiguous_format) if needs[2] else None,
            torch.empty_like(weights) if needs[4] else None,
            needs[5:7],
            ctx.operands.adapters.make_sums(),
        )
        # If this pass is interrupted, the next must not reuse a kept output for another slice.
        kept, ctx.kept = ctx.kept, []
        decoded = None
        if ctx.decodes_once:
            decoded = triton_launch.decode_all(operands.stack.gate_up, dout.dtype)
        if saved:
            kept = [(saved[0], triton_launch.Routing(*saved[1:]))]

        def differentiate(part: slice) -> tuple[torch.Tensor | None, torch.Tensor | None]:
            """Fill one slice's gradients, and free its gate_up output before the next slice."""
            rows: Any = None if x is None else x[part]
            own = ExpertCall(rows, indices[part], weights[part])
            routing = kept[0][1] if kept else triton_launch.sort_all(own, operands)

            def recall() -> tuple[torch.Tensor, torch.Tensor | None]:
                gate_up = kept.pop(0)[0] if kept else None  # freed as soon as the caller does
                if gate_up is None:
                    given = (rows, own.indices, operands, routing, decoded)
                    gate_up = triton_launch.run_gate_up(*given)
                return gate_up, rows

            forward = triton_launch.SavedForward(recall, routing, *own[1:], decoded)
            is_recomputable = rows is not None
            return triton_launch.run_backward(
                dout[part], forward, operands, gradients.part(part), overwrite=is_recomputable
            )

        with torch.cuda.device_of(dout):
            # Bias gradients exist only if there is a single slice.
            biases = [differentiate(part) for part in slices(len(dout), ctx.slice_tokens)][-1]
        factors = [
            None if sums is None else sums.to(factor.dtype)
            for sums, factor in zip(
                gradients.adapters.factors, ctx.operands.adapters.factors, strict=True
            )
        ]
        dresidual = dout if needs[1] else None
        return None, dresidual, gradients.x, None, gradients.weights, *biases, *factors


def _decodes_once(call: ExpertCall, operands: ExpertOperands) -> bool:
    """Return whether the backward pass decodes gate_up's weights once, for both its products.

    It does so only in the memory of kept outputs that later layers have freed by then.
    """
    if operands.backend != "decode":
        return False
    _, out_features, groups, _ = operands.stack.gate_up.blocks.shape
    freed = freed_outputs() * call.indices.numel() * out_features
    return freed >= operands.stack.experts * out_features * groups * 32


def slices(tokens: int, size: int) -> list[slice]:
    """Split [0, tokens) into slices of nearly equal length, none longer than `size`."""
    return split_evenly(tokens, -(-tokens // size))


def split_evenly(tokens: int, count: int) -> list[slice]:
    """Split [0, tokens) into `count` slices of nearly equal length."""
    ends = [tokens * n // count for n in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def choose(x: torch.Tensor, entries: int, experts: int, backend: str | None) -> str:
    """Return the backend for a call: the named one, or the measured table's.

    Args:
        x: rows of the call, for their device and dtype.
        entries: number of routed tokens, rows * top_k.
        experts: number of experts in the layer.
        backend: one of `BACKENDS`, or None.

    Raises:
        ValueError: The name is unknown, or the backend cannot take the call.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r}; allowed: None, {', '.join(BACKENDS)}")
    if backend is None:
        architecture = architecture_of(x.device)
        backend = choice.choose_backend(architecture, entries, experts).backend
    if backend == "torch":
        return backend
    if x.device.type != "cuda":
        raise ValueError(f"backend: {backend} with {x.device.type} tensors; allowed: torch")
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"x: {x.dtype}; allowed with {backend}: torch.bfloat16, torch.float32")
    return backend


def _can_generate(call: ExpertCall, operands: ExpertOperands) -> bool:
    """Return whether the forward-only pass for a few tokens can take the call."""
    few = call.indices.numel() <= MOST_CHOICES and call.x.dtype == torch.bfloat16
    return few and operands.adapters.are_absent and not _needs_gradient(call, operands)


def _needs_gradient(
    call: ExpertCall, operands: ExpertOperands, residual: torch.Tensor | None = None
) -> bool:
    tensors = (call.x, call.weights, residual, *operands.trainable)
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
