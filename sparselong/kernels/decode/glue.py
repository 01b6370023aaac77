"""The kernels between the large products of a decoding step: norms, router, embedding, head.

A product's kernel needs x in an order that lets a warp read adjacent words, so the kernels here,
which produce x, store it in that order:

- *pairs* (`gemv.py`): bf16 pairs (x[32 b + 2 i], x[32 b + 2 i + 1]) at [i, b];
- *words* (`experts.py`): fp16 pairs (x[8 w + i], x[8 w + i + 4]) at [i, w]. Every block of 32 is
  scaled by a power of two that brings its largest magnitude near the top of fp16's range; the
  inverse is stored as the block's factor. A bf16 number within 2^27 of its block's largest keeps
  all its bits.

The router has one program per expert. Each normalizes the row and computes one logit, and the last
one to finish selects the top k and takes their softmax. The head's programs combine their largest
logits into one 64-bit word by an atomic maximum (`token_word.py`), from which the next step's
embedding takes its token: greedy generation needs no host synchronization. All sums are fp32 and in
a fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

WORD_TOP = 13
"""Blocks of *words* are scaled to a largest magnitude in [2^13, 2^14)."""
CODE_EXPONENT = 14
"""`experts.py` decodes a code to its value times 2^-14."""
NO_TOKEN = tl.constexpr(-(1 << 63))
HEAD_ROWS, HEAD_WARPS = 4, 1
HEAD_COLUMNS = 256


class RouteBuffers(NamedTuple):
    """What `launch_route` writes for one token: the experts' input and their selection.

    Attributes:
        planes: int32 [1, 4, width / 8]: the normalized row as words.
        factors: fp32 [width / 32]: the words' factors.
        logits: fp32 [experts].
        counter: int32 [1], zero before and after a launch.
        indices: int32 [1, top_k], the best expert first.
        weights: the row's dtype [1, top_k]: the experts' softmax weights.
    """

    planes: torch.Tensor
    factors: torch.Tensor
    logits: torch.Tensor
    counter: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor


@triton.jit
def _norm(x, weight, real, eps, WIDTH: tl.constexpr, dtype: tl.constexpr):
    """Return the RMSNorm of x, rounded as the model rounds it, as fp32."""
    mean = tl.sum(tl.where(real, x * x, 0.0)) / WIDTH
    normed = x * tl.math.rsqrt(mean + eps) * weight
    return normed.to(dtype).to(tl.float32)


@triton.jit
def _store_pairs(planes_ptr, x, block, lane, real, BLOCKS: tl.constexpr):
    """Store x [blocks, 32] as bf16 pairs; planes_ptr counts int16."""
    at = ((lane // 2) * BLOCKS + block) * 2 + lane % 2
    tl.store(planes_ptr + at, x.to(tl.bfloat16).to(tl.int16, bitcast=True), mask=real)


@triton.jit
def _store_words(
    planes_ptr, factors_ptr, x, block, lane, real, BLOCKS: tl.constexpr, TOP: tl.constexpr,
    CODES: tl.constexpr,
):  # fmt: skip
    """Store x [blocks, 32] as scaled fp16 pairs and a factor per block; planes_ptr counts int16."""
    largest = tl.max(tl.where(real, tl.abs(x), 0.0), 1)
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.minimum(tl.maximum(exponent, 32), 222)
    scale = ((TOP + 254 - exponent) << 23).to(tl.float32, bitcast=True)
    factor = ((exponent - TOP + CODES) << 23).to(tl.float32, bitcast=True)
    index = tl.reshape(block, [block.shape[0]])
    tl.store(factors_ptr + index, factor, mask=index < BLOCKS)
    x = (x * scale[:, None]).to(tl.float16).to(tl.int16, bitcast=True)
    word = block * 4 + lane // 8
    at = ((lane % 4) * (BLOCKS * 4) + word) * 2 + (lane % 8) // 4
    tl.store(planes_ptr + at, x, mask=real)


@triton.jit
def pack_kernel(
    x_ptr, weight_ptr, out_ptr, factors_ptr, eps,
    BLOCKS: tl.constexpr, TILE: tl.constexpr, NORM: tl.constexpr, KIND: tl.constexpr,
    TOP: tl.constexpr, CODES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Store one row, normalized or not, as "pairs", "words" or "plain". Grid: (tokens,)."""
    block = tl.arange(0, TILE)[:, None]
    lane = tl.arange(0, 32)[None, :]
    column = block * 32 + lane
    real = block + lane * 0 < BLOCKS
    token = tl.program_id(0)
    if NORM:
        weight = tl.load(weight_ptr + column, mask=real, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(x_ptr + token * BLOCKS * 32 + column, mask=real, other=0.0).to(tl.float32)
    if NORM:
        x = _norm(x, weight, real, eps, BLOCKS * 32, x_ptr.dtype.element_ty)
    out_ptr += token * BLOCKS * 32
    if KIND == "pairs":
        _store_pairs(out_ptr, x, block, lane, real, BLOCKS)
    elif KIND == "words":
        factors_ptr += token * BLOCKS
        _store_words(out_ptr, factors_ptr, x, block, lane, real, BLOCKS, TOP, CODES)
    else:
        tl.store(out_ptr + column, x.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def route_kernel(
    x_ptr, norm_ptr, router_ptr, bias_ptr, planes_ptr, factors_ptr, logits_ptr, counter_ptr,
    indices_ptr, weights_ptr, eps, experts,
    BLOCKS: tl.constexpr, TILE: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    TOP: tl.constexpr, CODES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Store the normalized row as words, its top k experts and their weights. Grid: (experts,)."""
    block = tl.arange(0, TILE)[:, None]
    lane = tl.arange(0, 32)[None, :]
    column = block * 32 + lane
    real = block + lane * 0 < BLOCKS
    expert = tl.program_id(0)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    router = tl.load(router_ptr + expert * BLOCKS * 32 + column, mask=real, other=0.0)
    weight = tl.load(norm_ptr + column, mask=real, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(x_ptr + column, mask=real, other=0.0).to(tl.float32)
    x = _norm(x, weight, real, eps, BLOCKS * 32, dtype)
    logit = tl.sum(x * router.to(tl.float32)) + tl.load(bias_ptr + expert).to(tl.float32)
    tl.store(logits_ptr + expert, logit.to(dtype).to(tl.float32))
    if expert == 0:
        _store_words(planes_ptr, factors_ptr, x, block, lane, real, BLOCKS, TOP, CODES)
    tl.debug_barrier()  # the logit is written before it is counted
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == experts - 1:
        tl.store(counter_ptr, 0)
        index = tl.arange(0, EXPERTS)
        inside = index < experts
        logits = tl.load(logits_ptr + index, mask=inside, other=float("-inf"), cache_modifier=".cg")
        above = (logits[None, :] > logits[:, None]) | (
            (logits[None, :] == logits[:, None]) & (index[None, :] < index[:, None])
        )
        rank = tl.sum(above.to(tl.int32), 1)
        chosen = (rank < TOP_K) & inside
        weights = tl.where(chosen, tl.exp(logits - tl.max(logits, 0)), 0.0)
        weights = weights / tl.sum(weights, 0)
        tl.store(indices_ptr + rank, index, mask=chosen)
        tl.store(weights_ptr + rank, weights.to(weights_ptr.dtype.element_ty), mask=chosen)


@triton.jit
def head_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, best_ptr, rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BEST: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write out [rows] = W x + bias + residual; with BEST, the largest also to `best_ptr`.

    Grid: (rows / ROWS,). W has its stored dtype, which is bf16 for models on a GPU.
    """
    row = tl.program_id(0) * ROWS
    at = tl.minimum(row + tl.arange(0, ROWS), rows - 1).to(tl.int64)[:, None]
    lane = tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    for step in tl.static_range((WIDTH + COLUMNS - 1) // COLUMNS):  # pyright: ignore[reportGeneralTypeIssues]
        column = step * COLUMNS + lane
        real = column < WIDTH
        place = weight_ptr + at * WIDTH + column[None, :]
        w = tl.load(place, mask=real[None, :], other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptr + column, mask=real, other=0.0).to(tl.float32)
        total += w.to(tl.float32) * x[None, :]
    out = tl.sum(total, 1)
    at = row + tl.arange(0, ROWS)
    inside = at < rows
    if BIAS:
        out += tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
    out = out.to(out_ptr.dtype.element_ty)
    if RESIDUAL:
        residual = tl.load(residual_ptr + at, mask=inside, other=0.0)
        out = (out.to(tl.float32) + residual.to(tl.float32)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, out, mask=inside)
    if BEST:
        value = out.to(tl.float32)
        bits = tl.where(value == value, value.to(tl.int32, bitcast=True), 0x7FC00000)
        order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
        key = (order << 32) | (0x7FFFFFFF - at).to(tl.int64)
        tl.atomic_max(best_ptr, tl.max(tl.where(inside, key, NO_TOKEN), 0), sem="relaxed")


@triton.jit
def embed_kernel(
    best_ptr, position_ptr, table_ptr, hidden_ptr, cleared_ptr,
    WIDTH: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Embed the token in `best_ptr` into hidden and advance the position. Grid: (1,)."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    column = tl.arange(0, TILE)
    token = 0x7FFFFFFF - (tl.load(best_ptr) & 0x7FFFFFFF)
    row = tl.load(table_ptr + token * WIDTH + column, mask=column < WIDTH, other=0.0)
    tl.store(hidden_ptr + column, row, mask=column < WIDTH)
    tl.debug_barrier()  # every warp has read the token
    tl.store(position_ptr, tl.load(position_ptr) + 1)
    tl.store(cleared_ptr, NO_TOKEN)


def tile_of(blocks: int) -> int:
    """Return the smallest power of two that is at least `blocks`."""
    return 1 << (blocks - 1).bit_length()


def pack_pairs(x: torch.Tensor) -> torch.Tensor:
    """Return x, bf16 [tokens, in], as pairs, int32 [tokens, 16, in / 32]."""
    blocks = x.shape[1] // 32
    planes = torch.empty((len(x), 16, blocks), dtype=torch.int32, device=x.device)
    launch_pack(x, None, planes.view(torch.int16), planes, "pairs", blocks)
    return planes


def pack_words(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the words of x [tokens, in] and their factors.

    Words are int32 [tokens, 4, in / 8], factors fp32 [tokens, in / 32].
    """
    blocks = x.shape[1] // 32
    planes = torch.empty((len(x), 4, blocks * 4), dtype=torch.int32, device=x.device)
    factors = torch.empty((len(x), blocks), dtype=torch.float32, device=x.device)
    launch_pack(x, None, planes.view(torch.int16), factors, "words", blocks)
    return planes, factors


def launch_pack(
    x: torch.Tensor,
    norm: tuple[torch.Tensor, float] | None,
    out: torch.Tensor,
    factors: torch.Tensor,
    kind: str,
    blocks: int,
    pdl: bool = False,
) -> None:
    """Store rows [tokens, blocks * 32], normalized with (weight, eps), as `kind` in `out`."""
    kernel: Any = pack_kernel  # Triton's type hints do not cover launches
    kernel[(x.numel() // (blocks * 32),)](
        *(x, x if norm is None else norm[0], out, factors, 0.0 if norm is None else norm[1]),
        BLOCKS=blocks,
        TILE=tile_of(blocks),
        NORM=norm is not None,
        KIND=kind,
        TOP=WORD_TOP,
        CODES=CODE_EXPONENT,
        PDL=pdl,
        num_warps=8,
        **({"launch_pdl": True} if pdl else {}),
    )


def launch_route(
    x: torch.Tensor,
    norm: tuple[torch.Tensor, float],
    router: torch.Tensor,
    bias: torch.Tensor,
    buffers: RouteBuffers,
    pdl: bool = False,
) -> None:
    """Normalize one row, store it as words and select its experts.

    Args:
        x: [width].
        norm: weight and eps.
        router: [experts, width].
        bias: [experts].
        buffers: written to.
        pdl: whether the launch overlaps the end of the previous kernel.
    """
    experts, width = router.shape
    planes, factors, logits, counter, indices, weights = buffers
    kernel: Any = route_kernel  # Triton's type hints do not cover launches
    kernel[(experts,)](
        *(x, norm[0], router, bias, planes.view(torch.int16), factors, logits, counter),
        *(indices, weights, norm[1], experts),
        BLOCKS=width // 32,
        TILE=tile_of(width // 32),
        EXPERTS=tile_of(experts),
        TOP_K=indices.shape[1],
        TOP=WORD_TOP,
        CODES=CODE_EXPONENT,
        PDL=pdl,
        num_warps=8,
        **({"launch_pdl": True} if pdl else {}),
    )


def launch_head(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    best: torch.Tensor | None = None,
    pdl: bool = False,
) -> None:
    """Write weight [rows, width] x + bias + residual to out, the largest to best, int64 [1]."""
    rows, width = weight.shape
    kernel: Any = head_kernel  # Triton's type hints do not cover launches
    kernel[(-(-rows // HEAD_ROWS),)](
        *(x, weight, weight if bias is None else bias, out if residual is None else residual),
        *(out, out if best is None else best, rows),
        WIDTH=width,
        ROWS=HEAD_ROWS,
        COLUMNS=HEAD_COLUMNS,
        BEST=best is not None,
        BIAS=bias is not None,
        RESIDUAL=residual is not None,
        PDL=pdl,
        num_warps=HEAD_WARPS,
        **({"launch_pdl": True} if pdl else {}),
    )


def launch_embed(
    best: torch.Tensor,
    position: torch.Tensor,
    table: torch.Tensor,
    hidden: torch.Tensor,
    pdl: bool = False,
) -> None:
    """Write the embedding of the token in `best`, int64 [1], to `hidden`.

    `best` is reset for the next token and `position` advances by one.
    """
    width = table.shape[1]
    kernel: Any = embed_kernel  # Triton's type hints do not cover launches
    kernel[(1,)](
        *(best, position, table, hidden, best),
        WIDTH=width,
        TILE=tile_of(width),
        PDL=pdl,
        num_warps=4,
        **({"launch_pdl": True} if pdl else {}),
    )
