"""Launches the kernels of `attention_kernels.py`: sizes, strides, tiles, outputs.

Deterministic: dq comes from a kernel over query tiles, dk and dv from one over key blocks, and
dsink from a sum over tiles in a fixed order. Inputs are read by stride; only the last axis must be
contiguous, and is made so by a copy where it is not. Outputs are laid out as [batch, tokens, heads,
head_dim] underneath, which is how the model's next projection reads them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from sparselong.kernels import attention_kernels
from sparselong.kernels.attention_mask import Mask
from sparselong.kernels.attention_tiles import Tile, architecture_of, tile_for

kernels: Any = attention_kernels  # triton's own types know no launch
HEAD_DIMS = (64,)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def refuse(mask: Mask, q: torch.Tensor, deterministic: bool) -> str | None:
    """Why this backend cannot take the call, or None."""
    if q.dtype not in DTYPES:
        return f"q: {q.dtype}; allowed: {', '.join(map(str, DTYPES))}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"head_dim: {q.shape[-1]}; allowed: {HEAD_DIMS[0]}"
    return None


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor,
    mask: Mask,
    scale: float,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """(out, lse, nothing more to save). Shapes as in `attention.attention`."""
    q, k, v = _rows_contiguous(q, k, v)
    out = _empty_token_major(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    tile, heads = _choose_tile("forward", q, k, mask)
    grid = (_blocks(mask.queries, tile.rows // heads), q.shape[1] // heads, mask.batch)
    kernels.forward_kernel[grid](
        *(q, k, v, sinks, _positions(mask, "starts", lse), out, lse),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3]),
        *_sizes(q, mask, scale),
        **_constants(tile, heads, q, k, mask),
    )
    return out, lse, ()


def attend_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    mask: Mask,
    scale: float,
    deterministic: bool,
    saved: tuple[torch.Tensor, ...],
    needs_dsinks: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(dq, dk, dv, dsinks in fp32 where needed)."""
    dout, q, k, v = _rows_contiguous(dout, q, k, v)
    dq, delta, dsinks = launch_dq(dout, q, k, v, sinks, out, lse, mask, scale, needs_dsinks)
    dk, dv = launch_dkdv(dout, q, k, v, lse, delta, mask, scale)
    return dq, dk, dv, dsinks


def launch_dq(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    mask: Mask,
    scale: float,
    needs_dsinks: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(dq, delta = rowsum(dout * out) like lse, dsinks in fp32 where needed)."""
    dq, delta = _empty_token_major(q), torch.empty_like(lse)
    tile, heads = _choose_tile("dq", q, k, mask)
    tiles = _blocks(mask.queries, tile.rows // heads)
    dsinks = lse
    if needs_dsinks:
        dsinks = torch.empty((*q.shape[:2], tiles), dtype=torch.float32, device=q.device)
    kernels.dq_kernel[(tiles, q.shape[1] // heads, mask.batch)](
        *(q, k, v, sinks, _positions(mask, "starts", lse), out, dout, lse, dq, delta, dsinks),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
        *(*out.stride()[:3], *dout.stride()[:3], *dq.stride()[:3]),
        *_sizes(q, mask, scale),
        SINK_GRADIENT=needs_dsinks,
        **_constants(tile, heads, q, k, mask),
    )
    return dq, delta, dsinks.sum((0, 2)) if needs_dsinks else None


def launch_dkdv(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    mask: Mask,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dk, dv); `delta` is `launch_dq`'s."""
    dk, dv = _empty_token_major(k), _empty_token_major(v)
    tile, heads = _choose_tile("dkdv", q, k, mask)
    kernels.dkdv_kernel[(_blocks(mask.keys, tile.keys), k.shape[1], mask.batch)](
        *(q, k, v, _positions(mask, "ends", lse), dout, lse, delta, dk, dv),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
        *(*dout.stride()[:3], *dk.stride()[:3], *dv.stride()[:3]),
        *_sizes(q, mask, scale),
        **_constants(tile, heads, q, k, mask),
    )
    return dk, dv


def _rows_contiguous(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def _empty_token_major(like: torch.Tensor) -> torch.Tensor:
    batch, heads, tokens, head_dim = like.shape
    shape = (batch, tokens, heads, head_dim)
    return torch.empty(shape, dtype=like.dtype, device=like.device).transpose(1, 2)


def _blocks(total: int, size: int) -> int:
    return -(-total // size)


def _positions(mask: Mask, name: str, unused: torch.Tensor) -> torch.Tensor:
    """A document array, or any tensor in its place where the kernel will not read it."""
    return unused if mask.documents is None else getattr(mask.documents, name)


def _sizes(q: torch.Tensor, mask: Mask, scale: float) -> tuple[int | float, ...]:
    return (q.shape[1], mask.queries, mask.keys, mask.offset, mask.window or 0, scale)


def _choose_tile(stage: str, q: torch.Tensor, k: torch.Tensor, mask: Mask) -> tuple[Tile, int]:
    """The tile, and how many heads share it: a power of two that divides the group."""
    kind = "window" if mask.window is not None else "packed" if mask.documents else "full"
    tile = tile_for(_architecture(q.device), stage, kind, q.dtype == torch.float32)
    group = q.shape[1] // k.shape[1]
    heads = min(tile.heads, group & -group)
    return tile, heads


@functools.cache
def _architecture(device: torch.device) -> str:
    if device.type != "cuda":  # Triton's interpreter
        return "interpreter"
    return architecture_of(*torch.cuda.get_device_capability(device))


def _constants(
    tile: Tile, heads: int, q: torch.Tensor, k: torch.Tensor, mask: Mask
) -> dict[str, Any]:
    return {
        "GROUP": q.shape[1] // k.shape[1],
        "HEADS": heads,
        "QUERIES": tile.rows // heads,
        "KEYS": tile.keys,
        "D": q.shape[-1],
        "HAS_DOCS": mask.documents is not None,
        "HAS_WINDOW": mask.window is not None,
        "SPLIT": tile.split,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
