"""Gradients of assembled keys and values, split into other ranks' and a rank's own.

Two query chunks give gradients for overlapping ranges of a shard's assembled keys. The gradients of
other ranks' keys are summed, rounded once and stored in the order in which they are sent. A rank's
own stay in fp32, because other ranks' contributions are added later. Plain torch needs a dozen
passes over an fp32 copy of all keys; on a GPU one Triton kernel reads each gradient once and writes
each sum once.

Shapes: B rows, S KV heads, D head_dim, K assembled keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from sparselong.kernels.launch import launch
from sparselong.kernels.layout import with_unit_stride

KEYS, WARPS = 32, 4
SIZES = ["keys", "first_0", "last_0", "first_1", "last_1"]  # unspecialized: no recompilation


class RunGradients(NamedTuple):
    """A query chunk's dk and dv, [B, S, n, D], of the n assembled keys from `first` on."""

    first: int
    dk: torch.Tensor
    dv: torch.Tensor


def sort_gradients(
    runs: tuple[RunGradients, RunGradients], places: torch.Tensor, sent: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients to send and the rank's own.

    Args:
        runs: gradients of two query chunks, whose ranges together cover all assembled keys.
        places: int32 [K]: each key's row among those to send or, bitwise inverted, among the
            rank's own. Every row occurs once.
        sent: number of keys to send.

    Returns:
        [sent, 2, B, S, D] in the gradients' dtype and [K - sent, 2, B, S, D] in fp32 or wider.
    """
    dk = runs[0].dk
    rows, heads, _, dim = dk.shape
    wide = torch.promote_types(dk.dtype, torch.float32)
    if not dk.is_cuda or wide != torch.float32 or dim & (dim - 1):
        return _sort_plainly(runs, places, wide)
    others = dk.new_empty(sent, 2, rows, heads, dim)
    own = dk.new_empty(len(places) - sent, 2, rows, heads, dim, dtype=wide)
    given: list[Any] = []
    for first, *pair in runs:
        pair = with_unit_stride(*pair)
        given += [*pair, first, first + pair[0].shape[2]]
        given += [stride for tensor in pair for stride in tensor.stride()[:3]]
    launch(
        sort_kernel,
        (-(-len(places) // KEYS), heads, rows),
        *(others, own, places, len(places), *given),
        KEYS=KEYS,
        D=dim,
        num_warps=WARPS,
    )
    return others, own


def _sort_plainly(
    runs: tuple[RunGradients, RunGradients], places: torch.Tensor, wide: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, heads, _, dim = runs[0].dk.shape
    total = torch.zeros(len(places), 2, rows, heads, dim, dtype=wide, device=places.device)
    for first, *pair in runs:
        for n, grad in enumerate(pair):
            total[first : first + grad.shape[2], n] += grad.permute(2, 0, 1, 3)
    order = places.argsort()  # the rank's own come first, in reverse
    owned = int((places < 0).sum())
    return total[order[owned:]].to(runs[0].dk.dtype), total[order[:owned].flip(0)]


@triton.jit(do_not_specialize=SIZES)
def sort_kernel(
    others_ptr, own_ptr, places_ptr, keys,
    dk_0_ptr, dv_0_ptr, first_0, last_0,
    dk_0_row, dk_0_head, dk_0_key, dv_0_row, dv_0_head, dv_0_key,
    dk_1_ptr, dv_1_ptr, first_1, last_1,
    dk_1_row, dk_1_head, dk_1_key, dv_1_row, dv_1_head, dv_1_key,
    KEYS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Sum and store one head's tile of keys. Grid: (key tiles, KV heads, batch rows)."""
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    heads, rows = tl.num_programs(1), tl.num_programs(2)
    inside = key < keys
    place = tl.load(places_ptr + key, mask=inside, other=0).to(tl.int64)
    to_others, to_own = inside & (place >= 0), inside & (place < 0)
    place = tl.where(place >= 0, place, -1 - place)
    lane = tl.arange(0, D)[None, :]
    in_0, in_1 = (key >= first_0) & (key < last_0), (key >= first_1) & (key < last_1)
    from_0, from_1 = (key - first_0).to(tl.int64), (key - first_1).to(tl.int64)
    dk = _read(dk_0_ptr + row * dk_0_row + head * dk_0_head, from_0 * dk_0_key, lane, in_0)
    dk += _read(dk_1_ptr + row * dk_1_row + head * dk_1_head, from_1 * dk_1_key, lane, in_1)
    at = (((place * 2) * rows + row) * heads + head)[:, None] * D + lane
    tl.store(others_ptr + at, dk.to(others_ptr.dtype.element_ty), mask=to_others[:, None])
    tl.store(own_ptr + at, dk, mask=to_own[:, None])
    dv = _read(dv_0_ptr + row * dv_0_row + head * dv_0_head, from_0 * dv_0_key, lane, in_0)
    dv += _read(dv_1_ptr + row * dv_1_row + head * dv_1_head, from_1 * dv_1_key, lane, in_1)
    at += rows * heads * D
    tl.store(others_ptr + at, dv.to(others_ptr.dtype.element_ty), mask=to_others[:, None])
    tl.store(own_ptr + at, dv, mask=to_own[:, None])


@triton.jit
def _read(base, at, lane, inside):
    """Load [KEYS, D] as fp32, with zeros outside."""
    return tl.load(base + at[:, None] + lane, mask=inside[:, None], other=0.0).to(tl.float32)
