"""gpt-oss's experts over packed MXFP4 weights, forward and backward; no bf16 copy of a layer.

The maths, for a token x with experts e_1 ... e_k of weights w_1 ... w_k:

    [gate, up] = x W_gate_up[e]^T + b_gate_up[e]          gate and up in alternating columns
    h = (clip(up, -limit, limit) + 1) * g * sigmoid(alpha * g),      g = min(gate, limit)
    out = sum_j w_j (h_j W_down[e_j]^T + b_down[e_j])

The weights are frozen; gradients flow to x, the routing weights and the biases. Saved for the
backward pass: the output of gate_up, [tokens * k, 2 * inner], and the routing. h is computed again.
Where no gradient is asked for nothing is saved, and gate_up's output goes as soon as h is there.
Inside a checkpointed layer (`runtime/recompute.py`) x alone is saved, and gate_up's output made
again, unless the layer keeps it.

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

from sparselong.kernels.experts import choice as expert_choice
from sparselong.kernels.experts.choice import BACKENDS
from sparselong.kernels.experts.torch_backend import expert_mlp_torch
from sparselong.kernels.gpu import architecture_of
from sparselong.runtime import current, is_checkpointed, is_second_pass, keeps_experts

ALPHA, LIMIT = 1.702, 7.0
SLICE_TOKENS = 16_384
"""Tokens that go through at once inside a checkpointed layer."""
MOST_CHOICES = 64
"""By "generation" every choice of a token goes through its expert's weight by itself."""


def expert_mlp(
    x: torch.Tensor,
    expert_indices: torch.Tensor,
    routing_weights: torch.Tensor,
    gate_up_blocks: torch.Tensor,
    gate_up_scales: torch.Tensor,
    gate_up_bias: torch.Tensor,
    down_blocks: torch.Tensor,
    down_scales: torch.Tensor,
    down_bias: torch.Tensor,
    *,
    alpha: float = ALPHA,
    limit: float = LIMIT,
    backend: str | None = None,
) -> torch.Tensor:
    """Weighted sum of the chosen experts' outputs. Gradients flow to x, weights and biases.

    Args:
        x: [tokens, hidden], bf16 or fp32 on a GPU, any floating dtype by "torch".
        expert_indices: int32 or int64 [tokens, top_k], each one of [0, experts).
        routing_weights: [tokens, top_k], any floating dtype; its gradient comes back in it.
        gate_up_blocks: uint8 [experts, 2 * inner, hidden / 32, 16], as the checkpoint has them;
            row 2j is gate j, row 2j + 1 is up j.
        gate_up_scales: uint8 [experts, 2 * inner, hidden / 32]; byte 255, NaN, is not looked for.
        gate_up_bias: [experts, 2 * inner].
        down_blocks, down_scales, down_bias: [experts, hidden, inner / 32, 16],
            [experts, hidden, inner / 32], [experts, hidden].
        alpha, limit: of the gate.
        backend: "generation" (at most 64 choices, no gradients), "small", "packed", "decode" or
            "torch"; None: the measured table's.

    Returns:
        [tokens, hidden] in x's dtype.

    The error of the output and of every gradient against fp64 is at most twice that of plain torch
    in the same dtype (tests/gpu/test_expert_gemm.py).

    Raises:
        ValueError: an argument is not as above; names it, what was found and what is allowed. An
            index out of range is a device-side assertion on a GPU; by "generation", NaN for its
            token.
    """
    gate_up = (gate_up_blocks, gate_up_scales, gate_up_bias)
    down = (down_blocks, down_scales, down_bias)
    check_calls(x, expert_indices, routing_weights, gate_up)
    check_weights(x, gate_up, down)
    name = choose(x, expert_indices, gate_up_blocks.shape[0], backend)
    tensors = (x, routing_weights, *gate_up, *down)
    if backend is None and name == "generation" and not _generates(expert_indices, tensors):
        name = "small"
    if x.shape[0] == 0:
        return x.clone()
    if name == "torch":
        return expert_mlp_torch(x, expert_indices, routing_weights, gate_up, down, alpha, limit)
    call = (x.contiguous(), expert_indices.contiguous(), routing_weights.contiguous())
    gate = (float(alpha), float(limit))
    if name == "generation":
        from sparselong.kernels.decode import experts as expert_generation

        if not _generates(expert_indices, tensors):
            raise ValueError(
                f"backend: generation with {expert_indices.numel()} choices, {x.dtype}, gradients "
                f"{'asked for' if _needs_gradient(tensors) else 'off'}; allowed: at most "
                f"{MOST_CHOICES} choices, torch.bfloat16, under torch.no_grad()"
            )
        with torch.cuda.device_of(x):
            return expert_generation.run_generation(*call, gate_up, down, gate)
    if not is_checkpointed() and not _needs_gradient(tensors):
        return _infer(*call, gate_up, down, gate, name)
    function = _CheckpointedExpertMlp if is_checkpointed() else _ExpertMlp
    return function.apply(*call, *gate_up, *down, gate, name)  # pyright: ignore[reportReturnType]


def _infer(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    down: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    gate: tuple[float, float],
    backend: str,
) -> torch.Tensor:
    from sparselong.kernels.experts import triton_launch as expert_triton

    rest = (expert_triton.Projection(*gate_up), expert_triton.Projection(*down), gate, backend)
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        for part in slices(len(x), current().inference_tokens or len(x)):
            expert_triton.run_inference(x[part], indices[part], weights[part], *rest, out[part])
    return out


class _ExpertMlp(torch.autograd.Function):
    """Stacks are referred to, not saved: a step changes what it trains of them, biases, only after
    its backward passes."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: torch.Tensor,
        indices: torch.Tensor,
        weights: torch.Tensor,
        gate_up_blocks: torch.Tensor,
        gate_up_scales: torch.Tensor,
        gate_up_bias: torch.Tensor,
        down_blocks: torch.Tensor,
        down_scales: torch.Tensor,
        down_bias: torch.Tensor,
        gate: tuple[float, float],
        backend: str,
    ) -> torch.Tensor:
        from sparselong.kernels.experts import triton_launch as expert_triton

        gate_up = expert_triton.Projection(gate_up_blocks, gate_up_scales, gate_up_bias)
        down = expert_triton.Projection(down_blocks, down_scales, down_bias)
        out = torch.empty_like(x)
        with torch.cuda.device_of(x):
            wide, routing = expert_triton.run_forward(
                x, indices, weights, gate_up, down, gate, backend, out
            )
        ctx.save_for_backward(wide, indices, weights, *routing)
        ctx.call = (gate_up, down, gate, backend)
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        from sparselong.kernels.experts import routing as expert_routing
        from sparselong.kernels.experts import triton_launch as expert_triton

        wide, indices, weights, *routing = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dx = torch.empty_like(dout, memory_format=torch.contiguous_format) if needs[0] else None
        dweights = torch.empty_like(weights) if needs[2] else None
        call = (dout, wide, expert_routing.Routing(*routing), indices, weights, *ctx.call)
        with torch.cuda.device_of(dout):
            biases = expert_triton.run_backward(
                *call, dx=dx, dweights=dweights, needs_biases=(needs[5], needs[8])
            )
        return dx, None, dweights, None, None, biases[0], None, None, biases[1], None, None


class _CheckpointedExpertMlp(torch.autograd.Function):
    """The pass inside a checkpointed layer: saves x, makes gate_up's output in the backward pass,
    or leaves it for a first backward pass.

    The layer's second pass then has nothing to compute here, and tokens go through in slices, so
    that what is alive at once does not grow with the length.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, *rest: Any
    ) -> torch.Tensor:
        from sparselong.kernels.experts import triton_launch as expert_triton

        *stacks, gate, backend = rest
        gate_up, down = (expert_triton.Projection(*stacks[n : n + 3]) for n in (0, 3))
        ctx.save_for_backward(x, indices, weights)
        ctx.call, ctx.kept = (gate_up, down, gate, backend), []
        needs = ctx.needs_input_grad
        # A bias's gradient is one sum over all tokens.
        ctx.slice_tokens = len(x) if needs[5] or needs[8] else SLICE_TOKENS
        if is_second_pass():
            return torch.full_like(x, math.nan)  # a use of it must show
        out, keeps = torch.empty_like(x), keeps_experts() and any(needs)
        with torch.cuda.device_of(x):
            for part in slices(len(x), ctx.slice_tokens):
                call = (x[part], indices[part], weights[part], *ctx.call)
                made = expert_triton.run_forward(*call, out[part])
                if keeps:
                    ctx.kept.append(made)
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        from sparselong.kernels.experts import triton_launch as expert_triton

        x, indices, weights = ctx.saved_tensors
        gate_up, _, _, backend = ctx.call
        needs = ctx.needs_input_grad
        dx = torch.empty_like(x) if needs[0] else None
        dweights = torch.empty_like(weights) if needs[2] else None
        # A pass that breaks off must leave no slice's output for another slice of the next.
        kept, ctx.kept = ctx.kept, []

        def differentiate(part: slice) -> tuple:
            """One slice's gradients; gate_up's output is gone before the next slice's is made."""
            wide, routing = (
                kept.pop(0)
                if kept
                else expert_triton.run_gate_up(x[part], indices[part], gate_up, backend)
            )
            call = (dout[part], wide, routing, indices[part], weights[part], *ctx.call)
            return expert_triton.run_backward(
                *call,
                dx=None if dx is None else dx[part],
                dweights=None if dweights is None else dweights[part],
                needs_biases=(needs[5], needs[8]),
                overwrite=True,
            )

        with torch.cuda.device_of(x):
            # Several slices have no gradients of biases.
            biases = [differentiate(part) for part in slices(len(x), ctx.slice_tokens)][-1]
        return dx, None, dweights, None, None, biases[0], None, None, biases[1], None, None


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


def _generates(indices: torch.Tensor, tensors: tuple[torch.Tensor, ...]) -> bool:
    """Whether the forward-only pass for a few tokens takes the call."""
    few = indices.numel() <= MOST_CHOICES
    return few and tensors[0].dtype == torch.bfloat16 and not _needs_gradient(tensors)


def _needs_gradient(inputs: tuple[torch.Tensor, ...]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)


def check_calls(
    x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, gate_up: tuple
) -> None:
    """Raises ValueError for rows, choices or routing weights that are not as `expert_mlp` says."""
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x: {x.dtype} {list(x.shape)}; allowed: floating [tokens, hidden]")
    if indices.dim() != 2 or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"expert_indices: {indices.dtype} {list(indices.shape)}; "
            "allowed: int32 or int64 [tokens, top_k]"
        )
    tokens, top_k = indices.shape
    experts = gate_up[0].shape[0]
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


def check_weights(x: torch.Tensor, gate_up: tuple, down: tuple) -> None:
    """Raises ValueError for stacks that are not as `expert_mlp` says."""
    hidden, (experts, wide) = x.shape[1], gate_up[0].shape[:2]
    inner = wide // 2
    shapes = {
        "gate_up_blocks": (gate_up[0], (experts, wide, hidden // 32, 16)),
        "gate_up_scales": (gate_up[1], (experts, wide, hidden // 32)),
        "gate_up_bias": (gate_up[2], (experts, wide)),
        "down_blocks": (down[0], (experts, hidden, inner // 32, 16)),
        "down_scales": (down[1], (experts, hidden, inner // 32)),
        "down_bias": (down[2], (experts, hidden)),
    }
    if hidden % 32:
        raise ValueError(f"x: hidden size {hidden}; allowed: a multiple of 32")
    if wide % 64:
        raise ValueError(f"gate_up_blocks: {wide} rows; allowed: a multiple of 64")
    for name, (tensor, shape) in shapes.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: shape {list(tensor.shape)}; allowed: {list(shape)}")
        packed = not name.endswith("_bias")
        if (tensor.dtype != torch.uint8) if packed else not tensor.is_floating_point():
            raise ValueError(
                f"{name}: {tensor.dtype}; allowed: {'torch.uint8' if packed else 'floating'}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name}: on {tensor.device}; allowed: x's device, {x.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: strides {list(tensor.stride())}; allowed: contiguous")
