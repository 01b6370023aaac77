"""Launches of the Triton attention kernels: sizes, strides, tiles, outputs.

Deterministic: one kernel over query tiles computes dq, one over key blocks computes dk and dv, and
dsink is summed over tiles in a fixed order. Inputs are read by stride; only the last axis must be
contiguous, and tensors in which it is not are copied. Outputs are laid out in memory as [batch,
tokens, heads, head_dim], which is how the model's next projection reads them. Kernels read the
sinks as contiguous, so strided sinks are copied.
"""

from __future__ import annotations

from typing import Any

import torch

from sparselong.kernels import gpu
from sparselong.kernels.attention import triton_backward, triton_forward, triton_split
from sparselong.kernels.attention.mask import Attended, AttentionCall, Gradients, Mask, SavedForward
from sparselong.kernels.attention.tiles import Tile, tile_for
from sparselong.kernels.launch import launch
from sparselong.kernels.layout import with_unit_stride

HEAD_DIMS = (64,)
FEW_QUERIES, SPLIT_KEYS = 16, 512  # most queries and fewest keys for a split
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def refuse(q: torch.Tensor, call: AttentionCall) -> str | None:
    """Return why this backend cannot take the call, or None if it can."""
    if q.dtype not in DTYPES:
        return f"q: {q.dtype}; allowed: {', '.join(map(str, DTYPES))}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"head_dim: {q.shape[-1]}; allowed: {HEAD_DIMS[0]}"
    return None


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor, call: AttentionCall
) -> Attended:
    """Return (out, lse, no further tensors); shapes as in `op.attention`."""
    mask, sinks = call.mask, sinks.contiguous()
    q, k, v = with_unit_stride(q, k, v)
    out = _empty_token_major(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if mask.queries <= FEW_QUERIES and min(mask.keys, mask.window or mask.keys) >= SPLIT_KEYS:
        _launch_split(q, k, v, sinks, out, lse, call)
        return out, lse, ()
    tile, heads = _choose_tile("forward", q, k, mask)
    grid = _grid(_blocks(mask.queries, tile.rows // heads), q.shape[1] // heads, mask)
    launch(
        triton_forward.forward_kernel,
        grid,
        *(q, k, v, sinks, _positions(mask, "starts", lse), out, lse),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3]),
        *_sizes(q, call),
        **_constants(tile, heads, q, k, mask),
    )
    return out, lse, ()


def _launch_split(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: AttentionCall,
) -> None:
    """Write out and lse of few queries by splitting the keys over programs."""
    mask, (batch, heads, queries) = call.mask, lse.shape
    tile, heads_a_tile = _choose_tile("split", q, k, mask)
    programs = heads // heads_a_tile * batch * _blocks(queries, tile.rows // heads_a_tile)
    wanted = min(_blocks(2 * gpu.multiprocessors_of(q.device), programs), triton_split.MOST_PARTS)
    span = max(_blocks(_blocks(mask.keys, wanted), tile.keys), 2) * tile.keys
    parts = _blocks(mask.keys, span)
    part_out = torch.empty((parts, *q.shape), dtype=torch.float32, device=q.device)
    part_lse = torch.empty((parts, *lse.shape), dtype=torch.float32, device=q.device)
    launch(
        triton_split.part_kernel,
        (parts, heads // heads_a_tile, programs * heads_a_tile // heads),
        *(q, k, v, _positions(mask, "starts", lse), part_out, part_lse),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
        *(*_sizes(q, call), batch, span),
        **_constants(tile, heads_a_tile, q, k, mask, "SPLIT"),
    )
    launch(
        triton_split.combine_kernel,
        (queries, heads, batch),
        *(part_out, part_lse, sinks, out, lse, *out.stride()[:3], batch, parts),
        **{"PARTS": triton_split.MOST_PARTS, "D": q.shape[-1], "num_warps": 4},
    )


def attend_backward(dout: torch.Tensor, saved: SavedForward, call: AttentionCall) -> Gradients:
    """Return the gradients: the first kernel computes delta and dq, the second dk and dv."""
    dout, q, k, v = with_unit_stride(dout, saved.q, saved.k, saved.v)
    saved = saved._replace(q=q, k=k, v=v, sinks=saved.sinks.contiguous())
    dq, delta, dsinks = launch_dq(dout, saved, call)
    dk, dv = launch_dkdv(dout, saved, delta, call)
    return dq, dk, dv, dsinks


def launch_dq(
    dout: torch.Tensor, saved: SavedForward, call: AttentionCall
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return (dq, delta = rowsum(dout * out) like lse, dsinks in fp32 where needed)."""
    q, k, v, sinks, out, lse, _ = saved
    mask = call.mask
    dq, delta = _empty_token_major(q), torch.empty_like(lse)
    tile, heads = _choose_tile("dq", q, k, mask)
    tiles = _blocks(mask.queries, tile.rows // heads)
    dsinks = lse
    if call.needs_dsinks:
        dsinks = torch.empty((*q.shape[:2], tiles), dtype=torch.float32, device=q.device)
    launch(
        triton_backward.dq_kernel,
        _grid(tiles, q.shape[1] // heads, mask),
        *(q, k, v, sinks, _positions(mask, "starts", lse), out, dout, lse, dq, delta, dsinks),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
        *(*out.stride()[:3], *dout.stride()[:3], *dq.stride()[:3]),
        *_sizes(q, call),
        SINK_GRADIENT=call.needs_dsinks,
        **_constants(tile, heads, q, k, mask),
    )
    return dq, delta, dsinks.sum((0, 2)) if call.needs_dsinks else None


def launch_dkdv(
    dout: torch.Tensor, saved: SavedForward, delta: torch.Tensor, call: AttentionCall
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (dk, dv); `delta` comes from `launch_dq`."""
    q, k, v, _, _, lse, _ = saved
    mask = call.mask
    dk, dv = _empty_token_major(k), _empty_token_major(v)
    tile, heads = _choose_tile("dkdv", q, k, mask)
    grid = _grid(_blocks(mask.keys, tile.keys), k.shape[1], mask)
    packed = mask.documents is not None and mask.window is None
    order = mask.documents.order_blocks(tile.keys) if packed else lse
    launch(
        triton_backward.dkdv_kernel,
        grid,
        *(q, k, v, _positions(mask, "ends", lse), order, dout, lse, delta, dk, dv),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
        *(*dout.stride()[:3], *dk.stride()[:3], *dv.stride()[:3]),
        *_sizes(q, call),
        **_constants(tile, heads, q, k, mask),
    )
    return dk, dv


def _empty_token_major(like: torch.Tensor) -> torch.Tensor:
    batch, heads, tokens, head_dim = like.shape
    shape = (batch, tokens, heads, head_dim)
    return torch.empty(shape, dtype=like.dtype, device=like.device).transpose(1, 2)


def _blocks(total: int, size: int) -> int:
    return -(-total // size)


def _grid(blocks: int, heads: int, mask: Mask) -> tuple[int, int, int]:
    """Return the grid that `triton_forward.place_program` reads."""
    packed = mask.documents is not None and mask.window is None
    return (heads, blocks, mask.batch) if packed else (blocks, heads, mask.batch)


def _positions(mask: Mask, name: str, unused: torch.Tensor) -> torch.Tensor:
    """Return a document array or, where the kernel reads none, the unused stand-in."""
    return unused if mask.documents is None else getattr(mask.documents, name)


def _sizes(q: torch.Tensor, call: AttentionCall) -> tuple[int | float, ...]:
    mask = call.mask
    return (q.shape[1], mask.queries, mask.keys, mask.offset, mask.window or 0, call.scale)


def _choose_tile(stage: str, q: torch.Tensor, k: torch.Tensor, mask: Mask) -> tuple[Tile, int]:
    """Return the tile and the number of heads in it, a power of two that divides the group."""
    kind = "window" if mask.window is not None else "packed" if mask.documents else "full"
    tile = tile_for(gpu.tiles_of(q.device), stage, kind, q.dtype == torch.float32)
    group = q.shape[1] // k.shape[1]
    heads = min(tile.heads, group & -group)
    return tile, heads


def _constants(
    tile: Tile, heads: int, q: torch.Tensor, k: torch.Tensor, mask: Mask, *without: str
) -> dict[str, Any]:
    constants = {
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
    return {name: value for name, value in constants.items() if name not in without}
