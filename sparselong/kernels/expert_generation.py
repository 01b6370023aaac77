"""The experts' pass for a few tokens, forward only: two kernels, no sorting, no tensor cores.

Generation reads the packed weights of the active experts and does little else, so what counts is
how many bytes are on their way at once, and next how few instructions decode a weight: a GPU that
reads 4 TB/s sees two weights pass for each instruction a lane can spend on them. A warp takes a few
rows of an expert's weight; a lane takes words of eight codes. E2M1 is the upper byte of an fp16
number times 2^14 (sign, two of the exponent's bits, one of the mantissa's), so eleven instructions
make eight fp16 weights, exactly, and four multiply them by eight inputs in fp16: products of two
and eleven significant bits, a half's four of a word summed in fp16, everything after in fp32. The
inputs' powers of two (`generation_glue.py`) and the weights' scales are applied to fp32 sums.

Rounding within a word is 2^-11 of a sum of four, against 2^-8 in the bf16 output; together the
error against fp64 is at most twice that of plain torch in bf16 (tests/gpu/test_expert_gemm.py).

The first kernel ends in the gate, the second in the weighted sum over a token's choices. Two tokens
that choose the same expert both go through its weight, the second time mostly from the cache.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparselong.kernels.generation_glue import CODE_EXPONENT, pack_words


class GenerationTile(NamedTuple):
    """Weight rows of a program of either kernel, and its warps."""

    gate_up_rows: int
    down_rows: int
    warps: int


TILE = GenerationTile(4, 2, 1)

# $0: two fp16 sums over a word of eight codes, $1; $2 ... $5: inputs (i, i + 4), i = 0 ... 3. `odd`
# and `even` get the upper bytes of the fp16 weights of the codes 1, 3, 5, 7 and 0, 2, 4, 6.
MULTIPLY_PTX = tl.constexpr("""{
.reg .b32 odd, even, t, w;
shr.u32 t, $1, 3;
and.b32 odd, $1, 0x80808080;
lop3.b32 odd, t, 0x0E0E0E0E, odd, 0xEA;
shl.b32 t, $1, 4;
and.b32 even, t, 0x80808080;
shl.b32 t, $1, 1;
lop3.b32 even, t, 0x0E0E0E0E, even, 0xEA;
and.b32 w, odd, 0xFF00FF00;
mul.rn.f16x2 t, w, $5;
prmt.b32 w, odd, 0, 0x2404;
fma.rn.f16x2 t, w, $3, t;
and.b32 w, even, 0xFF00FF00;
fma.rn.f16x2 t, w, $4, t;
prmt.b32 w, even, 0, 0x2404;
fma.rn.f16x2 $0, w, $2, t;
}""")
UNSPECIALIZED = ["experts"]


@triton.jit
def _multiply_rows(
    x_ptr, factors_ptr, words_ptr, scales_ptr, row, rows,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_FACTORS: tl.constexpr,
):  # fmt: skip
    """fp32 [ROWS], the products of x [GROUPS * 32] with rows `row`... of one expert's weight."""
    at = tl.minimum(row + tl.arange(0, ROWS), rows - 1)[:, None]
    WORDS: tl.constexpr = GROUPS * 4
    STEPS: tl.constexpr = (GROUPS + 31) // 32
    words = ()
    scales = ()
    for step in tl.static_range(STEPS):  # pyright: ignore[reportGeneralTypeIssues]
        word = (step * 128 + tl.arange(0, 128))[None, :]
        place = words_ptr + at * WORDS + word
        words += (tl.load(place, mask=word < WORDS, other=0, eviction_policy="evict_first"),)
        group = (step * 32 + tl.arange(0, 32))[None, :]
        place = scales_ptr + at * GROUPS + group
        scales += (tl.load(place, mask=group < GROUPS, other=0).to(tl.int32),)
    total = tl.zeros([ROWS, 32], tl.float32)
    for step in tl.static_range(STEPS):  # pyright: ignore[reportGeneralTypeIssues]
        word = (step * 128 + tl.arange(0, 128))[None, :]
        x = ()
        for pair in tl.static_range(4):  # pyright: ignore[reportGeneralTypeIssues]
            x += (tl.load(x_ptr + pair * WORDS + word, mask=word < WORDS, other=0),)
        sums = tl.inline_asm_elementwise(
            MULTIPLY_PTX, "=r,r,r,r,r,r",  # pyright: ignore[reportArgumentType]
            (words[step],) + x, dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
        low = sums.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (sums >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        products = tl.sum(tl.reshape(low + high, [ROWS, 32, 4]), 2)
        exponent = scales[step]
        scale = tl.where(exponent == 0, 0x400000, exponent << 23).to(tl.float32, bitcast=True)
        if BLOCK_FACTORS:
            group = step * 32 + tl.arange(0, 32)
            factor = tl.load(factors_ptr + group, mask=group < GROUPS, other=0.0)
            products *= factor[None, :]
        total += products * scale
    return tl.sum(total, 1)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gate_up_kernel(
    x_ptr, factors_ptr, indices_ptr, words_ptr, scales_ptr, bias_ptr, h_ptr, experts,
    alpha, limit, h_scale,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """h [entries, WIDE / 2] as words times `h_scale`, the gate's output. h_ptr counts int16.

    Grid: (entries, WIDE / ROWS). An index that is no expert's makes its row NaN.
    """
    entry = tl.program_id(0)
    row = tl.program_id(1) * ROWS
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.load(indices_ptr + entry).to(tl.int64)
    known = (expert >= 0) & (expert < experts)
    expert = tl.where(known, expert, 0)
    token = entry // TOP_K
    wide = _multiply_rows(
        x_ptr + token * GROUPS * 16, factors_ptr + token * GROUPS,
        words_ptr + expert * (WIDE * GROUPS * 4), scales_ptr + expert * (WIDE * GROUPS),
        row, WIDE, ROWS, GROUPS, True,
    )  # fmt: skip
    at = row + tl.arange(0, ROWS)
    wide += tl.load(bias_ptr + expert * WIDE + at, mask=at < WIDE, other=0.0).to(tl.float32)
    gate, up = tl.split(tl.reshape(wide, [ROWS // 2, 2]))  # pyright: ignore[reportGeneralTypeIssues]
    gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
    h = (up + 1.0) * gate / (1.0 + tl.exp(-alpha * gate))
    h = tl.where(known, h * h_scale, float("nan"))
    at = row // 2 + tl.arange(0, ROWS // 2)
    place = ((at % 4) * (WIDE // 16) + at // 8) * 2 + (at % 8) // 4
    bits = h.to(tl.float16).to(tl.int16, bitcast=True)
    tl.store(h_ptr + entry * (WIDE // 2) + place, bits, mask=at < WIDE // 2)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def down_kernel(
    h_ptr, indices_ptr, weights_ptr, words_ptr, scales_ptr, bias_ptr, residual_ptr, out_ptr,
    experts, h_factor,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [tokens, WIDTH], the weighted sum of the choices, plus the residual.

    Grid: (tokens, WIDTH / ROWS). `h_factor` undoes the scale of h and of the codes.
    """
    token = tl.program_id(0)
    row = tl.program_id(1) * ROWS
    at = row + tl.arange(0, ROWS)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    out = tl.zeros([ROWS], tl.float32)
    for choice in tl.static_range(TOP_K):  # pyright: ignore[reportGeneralTypeIssues]
        entry = token * TOP_K + choice
        expert = tl.load(indices_ptr + entry).to(tl.int64)
        expert = tl.where((expert >= 0) & (expert < experts), expert, 0)  # h is NaN then
        y = h_factor * _multiply_rows(
            h_ptr + entry * GROUPS * 16, h_ptr,
            words_ptr + expert * (WIDTH * GROUPS * 4), scales_ptr + expert * (WIDTH * GROUPS),
            row, WIDTH, ROWS, GROUPS, False,
        )  # fmt: skip
        y += tl.load(bias_ptr + expert * WIDTH + at, mask=at < WIDTH, other=0.0).to(tl.float32)
        out += y * tl.load(weights_ptr + entry).to(tl.float32)
    place = token * WIDTH + at
    out = out.to(out_ptr.dtype.element_ty)
    if RESIDUAL:
        residual = tl.load(residual_ptr + place, mask=at < WIDTH, other=0.0)
        out = (out.to(tl.float32) + residual.to(tl.float32)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place, out, mask=at < WIDTH)


def run_generation(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    down: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    gate: tuple[float, float],
) -> torch.Tensor:
    """out [tokens, hidden]; arguments as of `expert_triton.run_forward`, `gate` alpha and limit."""
    planes, factors = pack_words(x)
    out = torch.empty_like(x)
    launch_experts(planes, factors, indices.contiguous(), weights, gate_up, down, gate, out)
    return out


def launch_experts(
    planes: torch.Tensor,
    factors: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    down: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    gate: tuple[float, float],
    out: torch.Tensor,
    residual: torch.Tensor | None = None,
    h: torch.Tensor | None = None,
    pdl: bool = False,
) -> None:
    """Both kernels into out [tokens, hidden], plus the residual.

    Args:
        planes, factors: the tokens as words (`generation_glue.py`).
        indices, weights: [tokens, top_k], contiguous.
        gate_up, down: blocks, scales and bias of all experts.
        gate: alpha and limit.
        out: may be `residual` itself.
        h: int32 [tokens * top_k, inner / 2] for the gate's output; None: made here.
        pdl: each launch overlaps the end of the one before it.
    """
    tokens, top_k = indices.shape
    experts, wide, groups, _ = gate_up[0].shape
    inner_groups = down[0].shape[2]
    if h is None:
        h = torch.empty((indices.numel(), wide // 4), dtype=torch.int32, device=out.device)
    alpha, limit = gate
    # |h| <= (limit + 1) * limit: the largest power of two that keeps it under fp16's end.
    exponent = math.floor(math.log2(32_768 / ((limit + 1) * limit)))
    launch: Any = {"TOP_K": top_k, "PDL": pdl, "num_warps": TILE.warps}
    launch |= {"launch_pdl": True} if pdl else {}
    kernels: Any = (gate_up_kernel, down_kernel)  # triton's own types know no launch
    kernels[0][(indices.numel(), -(-wide // TILE.gate_up_rows))](
        *(planes, factors, indices, gate_up[0].view(torch.int32), *gate_up[1:]),
        *(h.view(torch.int16), experts, alpha, limit, 2.0**exponent),
        ROWS=TILE.gate_up_rows, WIDE=wide, GROUPS=groups, **launch,
    )  # fmt: skip
    width = out.shape[-1]
    kernels[1][(tokens, -(-width // TILE.down_rows))](
        *(h, indices, weights, down[0].view(torch.int32), *down[1:]),
        *(out if residual is None else residual, out, experts, 2.0 ** (CODE_EXPONENT - exponent)),
        ROWS=TILE.down_rows, WIDTH=width, GROUPS=inner_groups, RESIDUAL=residual is not None,
        **launch,
    )  # fmt: skip
