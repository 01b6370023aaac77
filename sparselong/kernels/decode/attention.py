"""Attention of one new token over a fixed-size cache; its position is known only on the device.

A layer's cache has `capacity` slots; position p lives in slot p mod capacity. A full layer has as
many slots as there can be positions. A sliding layer has as many as its window, so the new key
overwrites the one that leaves the window. Softmax does not depend on the order of keys, and the
slots in use are the first min(p + 1, capacity): nothing else is masked, and one kernel serves both
kinds of layer.

With `PDL` the first keys are loaded before the wait. That is safe because the preceding kernel
writes neither the cache nor the position, which the first kernel of a step advances.

The kernel rotates the new query and key by the position's angles, stores the new key and value, and
attends. The keys are split over PARTS programs per KV head. Each writes its softmax's output and
log-sum-exp (base 2, fp32), and the last one to finish combines all parts and the sinks in a fixed
order, so results are bitwise reproducible. The output is stored in the order that the output
projection reads: as pairs (`glue.py`) or plain.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparselong.kernels.attention import LOG2E

QUERIES = 16
"""Rows of a product on tensor cores; the queries of a KV head fill only some of them."""
FULL_PARTS, WINDOW_PARTS = 16, 4
FULL_KEYS, WINDOW_KEYS = 64, 32


class LayerAttention(NamedTuple):
    """What distinguishes one layer's attention from another's.

    Attributes:
        sinks: [HEADS].
        scale: factor of the scores.
        is_window: whether the layer has a sliding window.
    """

    sinks: torch.Tensor
    scale: float
    is_window: bool


@triton.jit
def _turn(low, high, cos, sin, dtype: tl.constexpr):
    """Return both halves of a head after the rotary embedding, rounded to dtype."""
    return (low * cos - high * sin).to(dtype), (high * cos + low * sin).to(dtype)


@triton.jit
def _combine_parts(
    part_ptr, lse_ptr, sinks_ptr, out_ptr, head, row, dim,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr,
    PAIRS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Write one KV head's output from all its parts and the sinks, in the order of the parts."""
    real = (row < GROUP)[:, None]
    sink = tl.load(sinks_ptr + head, mask=row < GROUP, other=0.0).to(tl.float32) * LOG2E
    highest = sink
    for n in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
        lse = tl.load(lse_ptr + n * HEADS + head, mask=row < GROUP, cache_modifier=".cg")
        highest = tl.maximum(highest, lse)
    total = tl.math.exp2(sink - highest)
    acc = tl.zeros([16, D], tl.float32)
    for n in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
        lse = tl.load(lse_ptr + n * HEADS + head, mask=row < GROUP, cache_modifier=".cg")
        weight = tl.math.exp2(lse - highest)
        cell = (n * HEADS + head)[:, None] * D + dim[None, :]
        partial = tl.load(part_ptr + cell, mask=real, other=0.0, cache_modifier=".cg")
        total += weight
        acc += weight[:, None] * partial
    out = (acc / total[:, None]).to(dtype)
    column = head[:, None] * D + dim[None, :]
    if PAIRS:
        lane, block = column % 32, column // 32
        column = ((lane // 2) * (HEADS * D // 32) + block) * 2 + lane % 2
    tl.store(out_ptr + column, out, mask=real)


@triton.jit
def _load_keys(keys_ptr, values_ptr, start, last, KEYS: tl.constexpr, D: tl.constexpr):
    """Load the keys, in two halves, and the values of at most KEYS slots of [start, last)."""
    key = start + tl.arange(0, KEYS)
    inside = (key < last)[:, None]
    half, dim = tl.arange(0, D // 2), tl.arange(0, D)
    place = keys_ptr + key.to(tl.int64)[:, None] * D + half[None, :]
    low = tl.load(place, mask=inside, other=0.0, cache_modifier=".cg")
    high = tl.load(place + D // 2, mask=inside, other=0.0, cache_modifier=".cg")
    place = values_ptr + key.to(tl.int64)[:, None] * D + dim[None, :]
    return low, high, tl.load(place, mask=inside, other=0.0, cache_modifier=".cg")


@triton.jit(do_not_specialize=["capacity"])
def attend_kernel(
    qkv_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, sinks_ptr, part_ptr, lse_ptr, counter_ptr,
    out_ptr, position_ptr, scale, capacity,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr,
    PARTS: tl.constexpr, PAIRS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute one part of one KV head. Grid: (KV heads, PARTS).

    qkv: [HEADS + 2 KV heads, D]. cos, sin: [positions, D / 2]. keys, values: [KV heads, capacity,
    D]. part: fp32 [PARTS, HEADS, D]; lse: fp32 [PARTS, HEADS]; counter: int32 [KV heads], zeros.
    """
    kv_head, part = tl.program_id(0), tl.program_id(1)
    kv_heads = tl.num_programs(0)
    dtype: tl.constexpr = keys_ptr.dtype.element_ty
    HALF: tl.constexpr = D // 2
    position = tl.load(position_ptr, cache_modifier=".cg")
    slot = (position % capacity).to(tl.int32)
    seen = tl.minimum(position + 1, capacity).to(tl.int32)
    span = tl.cdiv(tl.cdiv(seen, PARTS), KEYS) * KEYS
    first = part * span
    last = tl.minimum(first + span, seen)
    keys_ptr += kv_head.to(tl.int64) * capacity * D
    values_ptr += kv_head.to(tl.int64) * capacity * D
    k_low, k_high, v = _load_keys(keys_ptr, values_ptr, first, last, KEYS, D)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, half, dim = tl.arange(0, 16), tl.arange(0, HALF), tl.arange(0, D)
    cos = tl.load(cos_ptr + position * HALF + half).to(tl.float32)
    sin = tl.load(sin_ptr + position * HALF + half).to(tl.float32)
    real = (row < GROUP)[:, None]
    place = qkv_ptr + (kv_head * GROUP + row)[:, None] * D + half[None, :]
    low = tl.load(place, mask=real, other=0.0).to(tl.float32)
    high = tl.load(place + HALF, mask=real, other=0.0).to(tl.float32)
    q_low, q_high = _turn(low, high, cos[None, :], sin[None, :], dtype)
    place = qkv_ptr + (HEADS + kv_head) * D + half
    low, high = tl.load(place).to(tl.float32), tl.load(place + HALF).to(tl.float32)
    new_low, new_high = _turn(low, high, cos, sin, dtype)
    new_value = tl.load(qkv_ptr + (HEADS + kv_heads + kv_head) * D + dim)
    if (slot >= first) & (slot < last):
        tl.store(keys_ptr + slot.to(tl.int64) * D + half, new_low)
        tl.store(keys_ptr + slot.to(tl.int64) * D + HALF + half, new_high)
        tl.store(values_ptr + slot.to(tl.int64) * D + dim, new_value)
    acc = tl.zeros([16, D], tl.float32)
    top = tl.full([16], -1e30, tl.float32)
    total = tl.zeros([16], tl.float32)
    for start in range(first, last, KEYS):
        key = start + tl.arange(0, KEYS)
        inside = key < last
        fresh = (key == slot)[:, None]  # the load may have seen the old or the new key
        k_low = tl.where(fresh, new_low[None, :], k_low)
        k_high = tl.where(fresh, new_high[None, :], k_high)
        v = tl.where(fresh, new_value[None, :], v)
        s = tl.dot(q_low, tl.trans(k_low), input_precision=PRECISION)
        s += tl.dot(q_high, tl.trans(k_high), input_precision=PRECISION)
        s = tl.where(inside[None, :], s * (scale * LOG2E), float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.math.exp2(s - new_top[:, None])
        kept = tl.math.exp2(top - new_top)
        total = total * kept + tl.sum(p, 1)
        acc = acc * kept[:, None] + tl.dot(p.to(dtype), v, input_precision=PRECISION)
        top = new_top
        k_low, k_high, v = _load_keys(keys_ptr, values_ptr, start + KEYS, last, KEYS, D)
    any_key = total > 0
    acc = acc / tl.where(any_key, total, 1.0)[:, None]
    lse = tl.where(any_key, top + tl.math.log2(total), float("-inf"))
    head = kv_head * GROUP + row
    at = part * HEADS + head
    tl.store(part_ptr + at[:, None] * D + dim[None, :], acc, mask=real)
    tl.store(lse_ptr + at, lse, mask=row < GROUP)
    tl.debug_barrier()  # the part is written before it is counted
    if tl.atomic_add(counter_ptr + kv_head, 1, sem="acq_rel") == PARTS - 1:
        tl.store(counter_ptr + kv_head, 0)
        _combine_parts(
            part_ptr, lse_ptr, sinks_ptr, out_ptr, head, row, dim,
            HEADS, GROUP, D, PARTS, PAIRS, dtype,
        )  # fmt: skip


def launch_attend(
    qkv: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    cache: tuple[torch.Tensor, torch.Tensor],
    layer: LayerAttention,
    scratch: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    position: torch.Tensor,
    *,
    pairs: bool,
    pdl: bool = False,
) -> None:
    """Store the new key and value and attend; see `attend_kernel` for shapes.

    Args:
        qkv: projections of the new token, before the rotary embedding.
        angles: cos and sin.
        cache: keys and values; bf16, or fp32 in the interpreter.
        layer: the layer's sinks, scale and kind.
        scratch: part, lse and counter, for FULL_PARTS parts.
        out: [HEADS * D], written to.
        position: int64 [1], the new token's.
        pairs: whether out is stored as pairs (`glue.py`) instead of plain.
        pdl: whether the launch overlaps the end of the previous kernel.
    """
    kv_heads, capacity, head_dim = cache[0].shape
    heads = layer.sinks.shape[0]
    kernel: Any = attend_kernel  # Triton's type hints do not cover launches
    parts = WINDOW_PARTS if layer.is_window else FULL_PARTS
    kernel[(kv_heads, parts)](
        *(qkv, *angles, *cache, layer.sinks, *scratch, out, position, layer.scale, capacity),
        HEADS=heads,
        GROUP=heads // kv_heads,
        D=head_dim,
        KEYS=WINDOW_KEYS if layer.is_window else FULL_KEYS,
        PARTS=parts,
        PAIRS=pairs,
        PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32",
        PDL=pdl,
        num_warps=4,
        **({"launch_pdl": True} if pdl else {}),
    )
