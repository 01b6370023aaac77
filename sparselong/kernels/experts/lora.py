"""The experts' pass with a low-rank adapter for each expert beside its frozen packed weight.

    y = x W[e]^T + bias[e] + s (x A[e]^T) B[e]^T        W: MXFP4, frozen; A, B: trained; s: a scale

for gate_up, for down, or for both; the rest is `op.py`'s pass. The two narrow products are
grouped by expert (`lora_triton.py`) and are added to the packed product's output; a delta
B A of a weight's size is never made. Gradients flow to x, the routing weights, A and B. With dy the
gradient of y, and u = s x A^T, g = s dy B of the rank's few columns:

    dx = dy W + g A          dA = g^T x          dB = dy^T u          (sums over the expert's rows)

The routing weight w comes in as late as in the plain pass: down's dy is the gradient before w, so
that dw = <dh, h> + <dout, bias> already holds the adapter's share, and w goes into g and u.

Saved for the backward pass: x, gate_up's output and the routing; h, u and g are made again. Inside
a checkpointed layer x alone is saved, unless the layer keeps its experts, and the layer's second
pass computes nothing here, as without adapters. On a CPU the pass goes expert by expert in plain
torch. Left out: trained biases, dropout, adapters of several users at once, the pass for a few
tokens (`generation`; `small` serves them).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from sparselong.kernels.experts import op as expert_gemm
from sparselong.kernels.experts.op import ALPHA, LIMIT
from sparselong.kernels.experts.torch_backend import expert_mlp_torch
from sparselong.runtime import is_checkpointed, is_second_pass, keeps_experts


class Adapter(NamedTuple):
    """A low-rank change of a stack of expert weights: W[e] + scaling * b[e] @ a[e].

    Attributes:
        a: [experts, r, in], floating, any strides.
        b: [experts, out, r], likewise.
        scaling: s.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


def expert_lora_mlp(
    x: torch.Tensor,
    expert_indices: torch.Tensor,
    routing_weights: torch.Tensor,
    gate_up: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    down: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    gate_up_adapter: Adapter | None,
    down_adapter: Adapter | None,
    *,
    alpha: float = ALPHA,
    limit: float = LIMIT,
    backend: str | None = None,
) -> torch.Tensor:
    """Weighted sum of the chosen experts' outputs, adapters included.

    Args:
        x, expert_indices, routing_weights, alpha, limit: as of `expert_gemm.expert_mlp`.
        gate_up, down: (blocks, scales, bias) as there; the bias must be frozen.
        gate_up_adapter, down_adapter: None leaves a stack as it is; at least one must be given.
        backend: "small", "packed", "decode" or "torch"; None: the measured table's.

    Returns:
        [tokens, hidden] in x's dtype. Products are taken in x's dtype with fp32 sums; A's and B's
        gradients are summed in fp32 and come back in A's and B's dtype.

    The error of the output and of every gradient against fp64 is at most twice that of plain torch
    in the same dtype (tests/gpu/test_expert_lora.py).

    Raises:
        ValueError: an argument is not as above; names it, what was found and what is allowed.
    """
    adapters = (gate_up_adapter, down_adapter)
    expert_gemm.check_calls(x, expert_indices, routing_weights, gate_up)
    expert_gemm.check_weights(x, gate_up, down)
    _check_adapters(gate_up, down, adapters)
    name = expert_gemm.choose(x, expert_indices, gate_up[0].shape[0], backend)
    if name == "torch" or x.shape[0] == 0:
        return expert_mlp_torch(
            x, expert_indices, routing_weights, gate_up, down, alpha, limit, adapters
        )
    factors = [t for one in adapters for t in ((None, None) if one is None else one[:2])]
    scalings = tuple(0.0 if one is None else float(one.scaling) for one in adapters)
    return _ExpertLora.apply(  # pyright: ignore[reportReturnType]
        x.contiguous(), expert_indices.contiguous(), routing_weights.contiguous(), *factors,
        *gate_up, *down, (float(alpha), float(limit)), scalings,
        "small" if name == "generation" else name,
    )  # fmt: skip


class _ExpertLora(torch.autograd.Function):
    """Inside a checkpointed layer tokens go through in slices, and gate_up's output is made again
    in the backward pass unless the layer keeps it. Stacks and factors are referred to, not saved: a
    step changes what it trains of them only after its backward passes."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, *rest: Any
    ) -> torch.Tensor:
        from sparselong.kernels.experts import lora_launch as triton_pass

        ctx.tensors, ctx.call, ctx.kept = rest[:10], rest[10:], []
        ctx.slice_tokens = expert_gemm.SLICE_TOKENS if is_checkpointed() else len(x)
        ctx.save_for_backward(x, indices, weights)
        if is_second_pass():
            return torch.full_like(x, math.nan)  # a use of it must show
        stacks = triton_pass.Stacks.of(ctx.tensors, ctx.call, x.dtype)
        out = torch.empty_like(x)
        keeps = any(ctx.needs_input_grad) and (keeps_experts() or not is_checkpointed())
        with torch.cuda.device_of(x):
            for part in expert_gemm.slices(len(x), ctx.slice_tokens):
                made = triton_pass.run_forward(
                    x[part], indices[part], weights[part], stacks, out[part]
                )
                if keeps:
                    ctx.kept.append(made)
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        from sparselong.kernels.experts import lora_launch as triton_pass

        x, indices, weights = ctx.saved_tensors
        stacks = triton_pass.Stacks.of(ctx.tensors, ctx.call, x.dtype)
        dx, dweights = torch.empty_like(x), torch.empty_like(weights)
        # A pass that breaks off must leave no slice's output for another slice of the next.
        kept, ctx.kept = ctx.kept, []
        factors = [
            None if t is None else torch.zeros_like(t, dtype=torch.float32) for t in ctx.tensors[:4]
        ]
        with torch.cuda.device_of(x):
            for part in expert_gemm.slices(len(x), ctx.slice_tokens):
                call = (x[part], indices[part], weights[part])
                wide, routing = kept.pop(0) if kept else triton_pass.run_gate_up(*call[:2], stacks)
                triton_pass.run_backward(
                    dout[part], *call, wide, routing, stacks, factors, dx[part], dweights[part]
                )
        grads = [
            None if g is None else g.to(t.dtype) for g, t in zip(factors, ctx.tensors, strict=False)
        ]
        return dx, None, dweights, *grads, *(None,) * 9


def _check_adapters(gate_up: tuple, down: tuple, adapters: tuple[Adapter | None, ...]) -> None:
    if adapters == (None, None):
        raise ValueError("gate_up_adapter, down_adapter: both None; allowed: at least one adapter")
    for name, stack, adapter in zip(("gate_up", "down"), (gate_up, down), adapters, strict=True):
        if stack[2].requires_grad:
            raise ValueError(f"{name}: its bias is trained; allowed beside adapters: frozen ones")
        if adapter is None:
            continue
        if not math.isfinite(adapter.scaling):
            raise ValueError(f"{name}_adapter.scaling: {adapter.scaling}; allowed: finite")
        experts, out, groups, _ = stack[0].shape
        rank = adapter.a.shape[1] if adapter.a.dim() == 3 else 0
        wanted = {"a": (experts, rank, 32 * groups), "b": (experts, out, rank)}
        for part, shape in wanted.items():
            tensor: torch.Tensor = getattr(adapter, part)
            fits = tuple(tensor.shape) == shape and rank > 0 and tensor.is_floating_point()
            if not fits or tensor.device != stack[0].device:
                raise ValueError(
                    f"{name}_adapter.{part}: {tensor.dtype} {list(tensor.shape)} on "
                    f"{tensor.device}; allowed: floating {list(shape)} on {stack[0].device}, r > 0"
                )
