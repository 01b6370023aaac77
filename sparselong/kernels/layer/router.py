"""gpt-oss's router as one kernel: logits, the top k experts and their softmax weights.

    l = round(x W^T + b)        e_1 ... e_k = the k largest of l        w = softmax(l[e_1 ... e_k])

and backward, with dl_j = w_j (dw_j - sum_i w_i dw_i) and the gradient dx that x has from its other
use, the experts:

    dx + sum_j dl_j W[e_j]

Plain torch needs four launches forward and seven backward, where a step of short sequences waits
for launches. Products are summed in fp32; logits are rounded to x's dtype before they are compared,
as in transformers, and softmax weights from fp32. Of equal logits the lowest expert's comes first;
a NaN counts as the largest, as in torch. Results of a row do not depend on the other rows.

Saved for backward: indices and weights, which a checkpointed layer's recomputation takes from the
forward pass (`runtime/recompute.py`). W and b are frozen here; a trained router runs in plain
torch, as does a CPU's (`model/fused.py`). The code is ours, under this repository's licence.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from sparselong.kernels.launch import launch
from sparselong.kernels.opaque import make_opaque
from sparselong.runtime import compute_once

ROWS, WARPS = 32, 8
BLOCK_BYTES = 128
"""Bytes of a row in a tile of x or W."""
MAX_EXPERTS = 256


class Router(NamedTuple):
    """A layer's frozen router.

    Attributes:
        weight: [experts, hidden].
        bias: [experts], in weight's dtype.
        top_k: experts per token.
        broken: bool [1], set to True if a logit is not finite; None: nobody asks.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    top_k: int
    broken: torch.Tensor | None = None

    def takes(self, x: torch.Tensor) -> bool:
        """Return whether `route` takes x, [..., hidden], with this router."""
        dtypes = {x.dtype, self.weight.dtype, self.bias.dtype}
        is_frozen = not (self.weight.requires_grad or self.bias.requires_grad)
        return x.is_cuda and is_frozen and len(dtypes) == 1 and len(self.weight) <= MAX_EXPERTS


def route(x: torch.Tensor, router: Router) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x, the experts' weights and their indices; differentiable in x.

    The experts should take the returned x: the backward pass then adds their gradient of it to the
    router's in the same kernel.

    Args:
        x: [tokens, hidden], which `router.takes`.
        router: the layer's router.

    Returns:
        x; weights [tokens, top_k] in x's dtype, largest first; indices, int32 [tokens, top_k].
    """
    if torch.compiler.is_compiling():
        return _route_in_graph(x, router)
    return _Route.apply(x, router)  # pyright: ignore[reportReturnType]


class _Route(torch.autograd.Function):
    """The router's two kernels."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: torch.Tensor, router: Router
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        if ctx.needs_input_grad[0]:  # a pass without gradients is not recomputed
            weights, indices = compute_once(lambda: _choose(x, router))
        else:
            weights, indices = _choose(x, router)
        ctx.router = router
        ctx.save_for_backward(weights, indices)
        ctx.mark_non_differentiable(indices)
        return x, weights, indices

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor | None, dweights: torch.Tensor | None, _: Any) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        if dweights is None:
            return dx, None
        weights, indices = ctx.saved_tensors
        return _launch_backward(dx, dweights, weights, indices, ctx.router.weight), None


def _launch_backward(
    dx: torch.Tensor | None,
    dweights: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    matrix: torch.Tensor,
) -> torch.Tensor:
    """Return the gradient of x, with dx, that of x's other use, added if given."""
    hidden = matrix.shape[1]
    out = torch.empty(len(weights), hidden, dtype=weights.dtype, device=weights.device)
    others = out if dx is None else dx if dx.stride(1) == 1 else dx.contiguous()
    if len(out):
        with torch.cuda.device_of(out):
            launch(
                _kernels().route_backward_kernel,
                (len(out),),
                *(others, dweights.contiguous(), weights, indices, matrix, out),
                *(others.stride(0), matrix.stride(0), hidden),
                TOP_K=weights.shape[1],
                HAS_OTHERS=dx is not None,
                BLOCK=1 << (hidden - 1).bit_length(),
                num_warps=WARPS,
            )
    return out


def _choose(x: torch.Tensor, router: Router) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights and the indices."""
    rows = x if x.stride(1) == 1 else x.contiguous()
    weights = torch.empty(len(x), router.top_k, dtype=x.dtype, device=x.device)
    indices = torch.empty(len(x), router.top_k, dtype=torch.int32, device=x.device)
    experts, hidden = router.weight.shape
    if len(x):
        with torch.cuda.device_of(x):
            launch(
                _kernels().route_kernel,
                (-(-len(x) // ROWS),),
                *(rows, router.weight, router.bias, weights, indices),
                weights if router.broken is None else router.broken.view(torch.uint8),
                *(rows.stride(0), router.weight.stride(0), len(x), hidden, experts),
                TOP_K=router.top_k,
                WATCHED=router.broken is not None,
                ROWS=ROWS,
                EXPERTS=max(16, 1 << (experts - 1).bit_length()),  # products need 16
                BLOCK=BLOCK_BYTES // x.itemsize,
                num_warps=WARPS,
            )
    return weights, indices


@functools.cache
def _kernels() -> Any:
    """Return the kernels' module, imported on first use because a CPU does not need Triton."""
    from sparselong.kernels.layer import router_triton

    return router_triton


def _route_in_graph(
    x: torch.Tensor, router: Router
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what `route` does, for torch.compile, which adds x's two gradients itself."""
    constants = router.top_k, router.broken is not None
    weights, indices, broken = _route_operator(x, router.weight, router.bias, *constants)
    if router.broken is not None:
        router.broken.logical_or_(broken)  # an operator changes none of its arguments
    return x, weights, indices


def _route(
    x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor, top_k: int, watched: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return weights, indices, and whether a logit is not finite, bool [1], if `watched`."""
    broken = torch.zeros(int(watched), dtype=torch.bool, device=x.device)
    return *_choose(x, Router(matrix, bias, top_k, broken if watched else None)), broken


def _like_route(
    x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor, top_k: int, watched: bool
) -> tuple[torch.Tensor, ...]:
    shape = (x.shape[0], top_k)
    broken = x.new_empty(int(watched), dtype=torch.bool)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int32), broken


def _differentiate_route(arguments: Any, results: Any, gradients: Any, needs: Any) -> tuple:
    (weights, indices), dweights = results, gradients[0]
    return _launch_backward(None, dweights, weights, indices, arguments[1]), None, None


_route_operator = make_opaque(
    _route, like=_like_route, differentiate=_differentiate_route, reads=(0, 1)
)
