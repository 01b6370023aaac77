"""RMSNorm as gpt-oss computes it, alone and fused with the residual sum before it.

The maths, with r_i = 1 / sqrt(mean_j h_ij^2 + eps) and everything in fp32:

    out = round(w h r)            g = w dout
    dh  = r (g - h r^2 mean_j(g h))        dw = sum_i dout h r

gpt-oss multiplies by the weight in fp32 and rounds once. Llama rounds before the weight, as Liger's
default casting mode does, which is a different function. The sum `x + residual` is rounded to its
dtype before the norm, because the model continues with the rounded sum. In the backward pass the
gradient of the sum is added to dh before the only rounding. Forward and backward each pass over
memory once: a read and a write for the norm, two reads and two writes with the residual.

Saved for backward: h (the input, or the sum), the weight, and r in fp32, one value per row.
Deterministic: dw is summed within row blocks, whose number depends only on the number of rows, and
then over the blocks. On a CPU plain torch runs (`norm_torch.py`). Source: Zhang and Sennrich
(2019), arXiv:1910.07467; the code is ours, under this repository's licence. Not supported: rows of
more than 16,384 elements on a GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from sparselong.kernels.launch import launch
from sparselong.kernels.layer.norm_torch import add_rms_norm_torch, rms_norm_torch
from sparselong.kernels.opaque import make_opaque

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HIDDEN = 16_384
WEIGHT_GRADIENT_BLOCKS = 512


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x with each row normalized; differentiable in x and weight.

    Args:
        x: [..., hidden], bf16, fp16 or fp32 (fp64 on a CPU). Rows may be strided.
        weight: [hidden], any floating dtype; its gradient has the same dtype.
        eps: added to the mean square.

    Returns:
        [..., hidden] in x's dtype, contiguous. Its error and that of the gradients against fp64
        are at most twice plain torch's in the same dtype (tests/gpu/test_layer.py).

    Raises:
        ValueError: an argument is not as above; the message names it, its value and what is
            allowed.
    """
    _check(x, weight)
    if not x.is_cuda:
        return rms_norm_torch(x, weight, eps)
    if torch.compiler.is_compiling():
        return _rms_norm_operator(x, weight, float(eps))[0]
    return RMSNormFunction.apply(x, None, weight, float(eps))[0]  # pyright: ignore[reportIndexIssue]


def rms_norm_and_input(
    x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (norm of x, x), for what uses both: x's gradients are added where they are computed.

    Arguments and errors are those of `rms_norm`.
    """
    _check(x, weight)
    if not x.is_cuda:
        return rms_norm_torch(x, weight, eps), x
    if torch.compiler.is_compiling():  # torch adds the two gradients
        return _rms_norm_operator(x, weight, float(eps))[0], x
    return RMSNormFunction.apply(x, None, weight, float(eps))  # pyright: ignore[reportReturnType]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (norm of the sum, the sum) of x and residual; differentiable in both and weight.

    Args:
        x: [..., hidden], dtypes as for `rms_norm`.
        residual: shaped like x; two dtypes are promoted as in torch.
        weight: as for `rms_norm`.
        eps: as for `rms_norm`.

    Returns:
        Two tensors [..., hidden], contiguous, in the sum's dtype; accuracy as for `rms_norm`.

    Raises:
        ValueError: an argument is not as above; the message names it, its value and what is
            allowed.
    """
    _check(x, weight)
    if residual.shape != x.shape or residual.device != x.device:
        raise ValueError(
            f"residual: {list(residual.shape)} on {residual.device}; "
            f"allowed: x's, {list(x.shape)} on {x.device}"
        )
    if not x.is_cuda:
        return add_rms_norm_torch(x, residual, weight, eps)
    if torch.compiler.is_compiling():
        total = x + residual
        return _rms_norm_operator(total, weight, float(eps))[0], total
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return RMSNormFunction.apply(x.to(dtype), residual.to(dtype), weight, float(eps))  # pyright: ignore[reportReturnType]


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.dim() < 1 or weight.shape != x.shape[-1:] or not weight.is_floating_point():
        raise ValueError(
            f"weight: {weight.dtype} {list(weight.shape)}; allowed: floating, with the length of "
            f"the last axis of x, {list(x.shape)}"
        )
    if weight.device != x.device:
        raise ValueError(f"weight: on {weight.device}; allowed: x's device, {x.device}")
    if not x.is_cuda:
        return
    if x.dtype not in DTYPES:
        raise ValueError(f"x: {x.dtype}; allowed on a GPU: {', '.join(map(str, DTYPES))}")
    if x.shape[-1] > MAX_HIDDEN:
        raise ValueError(f"x: rows of {x.shape[-1]}; allowed on a GPU: up to {MAX_HIDDEN}")


class RMSNormFunction(torch.autograd.Function):
    """Autograd function that fuses norm and residual sum; Triton only."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (out, sum); without a residual, (out, x)."""
        ctx.set_materialize_grads(False)
        weight = weight.contiguous()
        out, total, inverse = _launch_forward(x, residual, weight, eps)
        ctx.save_for_backward(x if total is None else total, weight, inverse)
        ctx.has_residual = residual is not None
        return out, x if total is None else total

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dtotal: torch.Tensor | None) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of x, residual and weight; eps has none."""
        h, weight, inverse = ctx.saved_tensors
        if dout is None:
            return dtotal, dtotal if ctx.has_residual else None, None, None
        dx, dweight = _launch_backward(dout, dtotal, h, weight, inverse, ctx.needs_input_grad[2])
        return dx, dx if ctx.has_residual else None, dweight, None


def _launch_forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Return the norm, the sum with the residual if there is one, and r."""
    rows = _rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(out)
    inverse = torch.empty(len(rows), dtype=torch.float32, device=x.device)
    added = rows if residual is None else _rows(residual)
    if rows.numel():
        with torch.cuda.device_of(x):
            launch(
                _kernels().forward_kernel,
                (len(rows),),
                *(rows, added, weight, out, out if total is None else total, inverse),
                *(rows.stride(0), added.stride(0), rows.shape[1], eps),
                HAS_RESIDUAL=residual is not None,
                **_blocks(rows.shape[1]),
            )
    return out, total, inverse


def _launch_backward(
    dout: torch.Tensor,
    dtotal: torch.Tensor | None,
    h: torch.Tensor,
    weight: torch.Tensor,
    inverse: torch.Tensor,
    needs_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the gradients of h, in h's dtype, and of weight, in weight's; None if not needed."""
    rows, upstream = _rows(h), _rows(dout)
    passed = upstream if dtotal is None else _rows(dtotal)
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    blocks = min(len(rows), WEIGHT_GRADIENT_BLOCKS) if needs_dweight else len(rows)
    partial = torch.empty(
        (blocks if needs_dweight else 0, rows.shape[1]), dtype=torch.float32, device=h.device
    )
    if rows.numel():
        with torch.cuda.device_of(h):
            launch(
                _kernels().backward_kernel,
                (blocks,),
                *(upstream, passed, rows, weight, inverse, dx, partial),
                *(upstream.stride(0), passed.stride(0), rows.stride(0)),
                *(len(rows), -(-len(rows) // blocks), rows.shape[1]),
                HAS_TOTAL=dtotal is not None,
                WEIGHT_GRADIENT=needs_dweight,
                **_blocks(rows.shape[1]),
            )
    return dx, partial.double().sum(0).to(weight.dtype) if needs_dweight else None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return [rows, hidden] with a contiguous last axis, as a view where strides allow it."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _blocks(hidden: int) -> dict[str, int]:
    block = 1 << (hidden - 1).bit_length()
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


@functools.cache
def _kernels() -> Any:
    """Return the kernels' module, imported on first use because a CPU does not need Triton."""
    from sparselong.kernels.layer import norm_triton as norm_kernels

    return norm_kernels


def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the norm and r for torch.compile."""
    out, _, inverse = _launch_forward(x, None, weight.contiguous(), eps)
    return out, inverse


def _like_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
    rows = x.numel() // x.shape[-1]
    return x.new_empty(x.shape), x.new_empty(rows, dtype=torch.float32)


def _differentiate_rms_norm(arguments: Any, results: Any, gradients: Any, needs: Any) -> tuple:
    (x, weight, _), (inverse,), dout = arguments, results, gradients[0]
    return _launch_backward(dout, None, x, weight.contiguous(), inverse, needs[1])


_rms_norm_operator = make_opaque(
    _rms_norm, like=_like_rms_norm, differentiate=_differentiate_rms_norm, reads=(1,)
)
