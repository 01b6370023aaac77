"""Rotary embedding of queries and keys in one kernel, forward and backward.

gpt-oss rotates dimension d of the first half of a head together with dimension d of the second:

    low'  = low cos - high sin            dlow  =  dlow' cos + dhigh' sin
    high' = high cos + low sin            dhigh = -dlow' sin + dhigh' cos

so the backward pass is the same kernel with the angle's sign flipped. Nothing is saved for it but
references to cos and sin, which all layers share. These are transformers': one value for each of
head_dim / 2 angles, with YaRN's concentration included. The arithmetic is fp32 with one rounding;
transformers rounds three times. Inputs are read by stride, so views of a projection's output cost
no copy, nor do transformers' cos and sin, whose last axis is not contiguous. Outputs are laid out
in memory as [batch, tokens, heads, head_dim], so that neither attention nor the projections'
backward pass needs a copy.

Where one product makes queries, keys and values (`adapters/joined.py`), the same kernel copies the
values, so that the product's output can be freed, and writes all three gradients into the joint
one.

On a CPU plain torch runs (`rotary_torch.py`). Source: Su et al. (2021), arXiv:2104.09864; the code
is ours, under this repository's licence. Not supported: interleaved pairs, and gradients of cos and
sin.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from sparselong.kernels.launch import launch
from sparselong.kernels.layer.rotary_torch import rotate_torch
from sparselong.kernels.layout import with_unit_stride
from sparselong.kernels.opaque import make_opaque

Projections = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries [batch, heads, tokens, head_dim], and keys and values [batch, kv_heads, ...]."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOKENS, HEADS = 4, 8


def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q and k rotated by their positions' angles; differentiable in q and k.

    Args:
        q: [batch, heads, tokens, head_dim], bf16, fp16 or fp32 (fp64 on a CPU), any strides.
        k: [batch, kv_heads, tokens, head_dim], q's dtype.
        cos: [batch or 1, tokens, head_dim / 2], floating; gets no gradient.
        sin: like cos.

    Returns:
        Rotated q and k in their shapes and dtype, laid out as [batch, tokens, heads, head_dim]. The
        error against fp64, gradients included, is at most twice plain torch's in the same dtype
        (tests/gpu/test_layer.py).

    Raises:
        ValueError: an argument is not as above; the message names it, its value and what is
            allowed.
    """
    _check(q, k, cos, sin)
    if not q.is_cuda:
        return rotate_torch(q, k, cos, sin)
    if torch.compiler.is_compiling():
        return _rotate_operator(q, k, cos, sin)
    return RotateFunction.apply(q, k, cos, sin)  # pyright: ignore[reportReturnType]


def _check(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    for name, tensor in (("q", q), ("k", k)):
        if tensor.dim() != 4 or tensor.shape[-1] % 2:
            raise ValueError(
                f"{name}: shape {list(tensor.shape)}; allowed: [batch, heads, tokens, head_dim] "
                "with an even head_dim"
            )
    batch, _, tokens, dim = q.shape
    if (k.shape[0], *k.shape[2:]) != (batch, tokens, dim) or k.dtype != q.dtype:
        raise ValueError(
            f"k: {k.dtype} {list(k.shape)}; allowed: q's dtype, batch, tokens and head_dim, "
            f"{q.dtype} {[batch, 'any', tokens, dim]}"
        )
    for name, tensor in (("cos", cos), ("sin", sin)):
        allowed = [(batch, tokens, dim // 2), (1, tokens, dim // 2)]
        if tuple(tensor.shape) not in allowed or not tensor.is_floating_point():
            raise ValueError(
                f"{name}: {tensor.dtype} {list(tensor.shape)}; "
                f"allowed: floating {[f'{batch} or 1', tokens, dim // 2]}"
            )
    for name, tensor in (("k", k), ("cos", cos), ("sin", sin)):
        if tensor.device != q.device:
            raise ValueError(f"{name}: on {tensor.device}; allowed: q's device, {q.device}")
    if q.is_cuda and q.dtype not in DTYPES:
        raise ValueError(f"q: {q.dtype}; allowed on a GPU: {', '.join(map(str, DTYPES))}")


def rotate_projections(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> Projections:
    """Return q and k rotated, and a copy of v, laid out as `rotate`'s results; no gradients.

    Args:
        q: as in `rotate`.
        k: as in `rotate`.
        v: k's shape and q's dtype, any strides.
        cos: as in `rotate`.
        sin: as in `rotate`.
    """
    places = _empty_token_major(q), _empty_token_major(k), _empty_token_major(v)
    _write((q, k, v), cos, sin, places, back=False)
    return places


def rotate_back(
    gradients: Projections, cos: torch.Tensor, sin: torch.Tensor, places: Projections
) -> None:
    """Write the gradients of q, k and v, given those of `rotate_projections`'s results.

    Args:
        gradients: of the rotated queries, the rotated keys and the values, any strides.
        cos: as in `rotate`.
        sin: as in `rotate`.
        places: where to write; the gradients' shapes, last axis contiguous.
    """
    _write(gradients, cos, sin, places, back=True)


def _write(
    given: Projections, cos: torch.Tensor, sin: torch.Tensor, places: Projections, back: bool
) -> None:
    if given[0].is_cuda:
        _launch(given, cos, sin, places, back=back)
        return
    rotated = rotate_torch(*given[:2], cos, -sin if back else sin)
    for place, result in zip(places, (*rotated, given[2]), strict=True):
        place.copy_(result)


class RotateFunction(torch.autograd.Function):
    """Autograd function of `rotate`; the backward pass rotates back. Triton only."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return q and k, rotated."""
        ctx.angles = cos, sin
        places = _empty_token_major(q), _empty_token_major(k)
        _launch((q, k), cos, sin, places, back=False)
        return places

    @staticmethod
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return dq and dk, rotated back; cos and sin have no gradients."""
        cos, sin = ctx.angles
        places = _empty_token_major(dq), _empty_token_major(dk)
        _launch((dq, dk), cos, sin, places, back=True)
        return *places, None, None


def _launch(
    given: Sequence[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    places: Sequence[torch.Tensor],
    back: bool,
) -> None:
    """Rotate q and k and, where they are three, copy v, from `given` into `places`."""
    given, has_values = with_unit_stride(*given), len(given) == 3
    batch, heads, tokens, dim = given[0].shape
    if given[0].numel() == 0:
        return
    # One row of angles for a whole batch is read with a stride of 0.
    cos, sin = (t.expand(batch, -1, -1) for t in (cos, sin))
    q, k, v = (*given, given[1])[:3]
    q_out, k_out, v_out = (*places, places[1])[:3]
    kv_groups = -(-k.shape[1] // HEADS)
    groups = -(-heads // HEADS) + kv_groups * (2 if has_values else 1)
    half = dim // 2
    with torch.cuda.device_of(q):
        launch(
            _kernels().rotate_kernel,
            (-(-tokens // TOKENS), groups, batch),
            *(q, k, v, cos, sin, q_out, k_out, v_out),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *cos.stride(), *sin.stride()),
            *(*q_out.stride()[:3], *k_out.stride()[:3], *v_out.stride()[:3]),
            *(heads, k.shape[1], tokens, half),
            BACK=back,
            HAS_VALUES=has_values,
            TOKENS=TOKENS,
            HEADS=HEADS,
            BLOCK=1 << (half - 1).bit_length(),
        )


def _empty_token_major(x: torch.Tensor) -> torch.Tensor:
    """Return an empty tensor like x [batch, heads, tokens, dim], stored tokens before heads."""
    batch, heads, tokens, dim = x.shape
    return torch.empty(batch, tokens, heads, dim, dtype=x.dtype, device=x.device).transpose(1, 2)


@functools.cache
def _kernels() -> Any:
    """Return the kernel's module, imported on first use because a CPU does not need Triton."""
    from sparselong.kernels.layer import rotary_triton as rotary_kernels

    return rotary_kernels


def _rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q and k, rotated, for torch.compile."""
    places = _empty_token_major(q), _empty_token_major(k)
    _launch((q, k), cos, sin, places, back=False)
    return places


def _like_rotate(q: torch.Tensor, k: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return _empty_token_major(q), _empty_token_major(k)


def _differentiate_rotate(arguments: Any, results: Any, gradients: Any, needs: Any) -> tuple:
    """Return the gradients of q and k; the arguments q and k are the rotated ones."""
    q, k, cos, sin = arguments
    given = zip((q, k), gradients, strict=True)
    dq, dk = (torch.zeros_like(like) if each is None else each for like, each in given)
    places = _empty_token_major(dq), _empty_token_major(dk)
    _launch((dq, dk), cos, sin, places, back=True)
    return *places, None, None


_rotate_operator = make_opaque(
    _rotate, like=_like_rotate, differentiate=_differentiate_rotate, stand_ins={0: 0, 1: 1}
)
