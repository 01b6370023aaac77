"""Forward-only expert pass for a few tokens: two kernels, no sorting, no tensor cores.

Generation does little besides reading the packed weights of the active experts. Speed depends first
on how many bytes are in flight, then on how few instructions decode a weight: at 4 TB/s, two
weights arrive for each instruction that a lane can spend on them. A warp takes a few rows of an
expert's weight; a lane takes words of eight codes. E2M1 is the upper byte of an fp16 value times
2^14 (sign, two exponent bits, one mantissa bit), so eleven instructions decode eight weights to
fp16 exactly, and four multiply them by eight inputs in fp16: products of two and eleven significant
bits, summed in fp16 over four codes of a word, then in fp32. The inputs' powers of two (`glue.py`)
and the weights' scales are applied to fp32 sums.

Rounding within a word is 2^-11 of its sum, against 2^-8 in the bf16 output; the total error against
fp64 is at most twice that of plain torch in bf16 (tests/gpu/test_experts.py).

The first kernel ends with the gate, the second with the weighted sum over a token's experts. Two
tokens routed to the same expert both read its weight, the second time mostly from the cache.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparselong.kernels.decode.glue import CODE_EXPONENT, pack_words
from sparselong.kernels.expert_stack import ExpertStack, Gate


class GenerationTile(NamedTuple):
    """Weight rows per warp in each kernel, and warps per program."""

    gate_up_rows: int
    down_rows: int
    warps: int


TILE = GenerationTile(2, 1, 4)

# $0 = $6 plus two fp16 sums over the eight codes of word $1; $2 ... $5 hold the inputs (i, i + 4)
# for i = 0 ... 3. `odd` and `even` hold the upper bytes of the fp16 weights of the codes 1, 3, 5, 7
# and 0, 2, 4, 6.
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
fma.rn.f16x2 t, w, $5, $6;
prmt.b32 w, odd, 0, 0x2404;
fma.rn.f16x2 t, w, $3, t;
and.b32 w, even, 0xFF00FF00;
fma.rn.f16x2 t, w, $4, t;
prmt.b32 w, even, 0, 0x2404;
fma.rn.f16x2 $0, w, $2, t;
}""")
UNSPECIALIZED = ["experts"]


@triton.jit
def _split_words(words, WARPS: tl.constexpr):
    """Split words [WARPS, 128] into each lane's first, second, third and fourth, [WARPS, 32]."""
    even, odd = tl.split(tl.reshape(words, [WARPS, 32, 2, 2]))  # pyright: ignore[reportGeneralTypeIssues]
    first, third = tl.split(even)  # pyright: ignore[reportGeneralTypeIssues]
    second, fourth = tl.split(odd)  # pyright: ignore[reportGeneralTypeIssues]
    return first, second, third, fourth


@triton.jit
def _multiply_group(words, x, WARPS: tl.constexpr):
    """Multiply each lane's group of four words by its 32 inputs; fp32 [WARPS, 32]."""
    w = _split_words(words, WARPS)
    total = tl.zeros([WARPS, 32], tl.float32)
    for half in tl.static_range(2):  # pyright: ignore[reportGeneralTypeIssues]
        sums = tl.zeros([WARPS, 32], tl.int32)
        for n in tl.static_range(2 * half, 2 * half + 2):  # pyright: ignore[reportGeneralTypeIssues]
            sums = tl.inline_asm_elementwise(
                MULTIPLY_PTX, "=r,r,r,r,r,r,r",  # pyright: ignore[reportArgumentType]
                (w[n], x[0][n], x[1][n], x[2][n], x[3][n], sums),
                dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
        total += sums.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        total += (sums >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return total


@triton.jit
def _multiply_rows(
    x_ptr, x_at, factors_ptr, words_ptr, scales_ptr, row, last,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, WARPS: tl.constexpr, BLOCK_FACTORS: tl.constexpr,
    WAIT: tl.constexpr,
):  # fmt: skip
    """Multiply warp w's x by its rows `row[w]`..., none past `last[w]`; ROWS tensors fp32 [WARPS].

    x_at: [WARPS], offset of a warp's x [GROUPS * 32]. row, last: [WARPS], rows of the stack of all
    experts. Every weight load is issued before the first is used, and with WAIT before the kernel
    that produces x has ended.
    """
    WORDS: tl.constexpr = GROUPS * 4
    STEPS: tl.constexpr = (GROUPS + 31) // 32
    words = ()
    scales = ()
    for step in tl.static_range(STEPS):  # pyright: ignore[reportGeneralTypeIssues]
        word = (step * 128 + tl.arange(0, 128))[None, :]
        group = (step * 32 + tl.arange(0, 32))[None, :]
        for n in tl.static_range(ROWS):  # pyright: ignore[reportGeneralTypeIssues]
            at = tl.minimum(row + n, last)[:, None]
            place = words_ptr + at * WORDS + word
            words += (tl.load(place, mask=word < WORDS, other=0, eviction_policy="evict_first"),)
            place = scales_ptr + at * GROUPS + group
            scales += (tl.load(place, mask=group < GROUPS, other=0).to(tl.int32),)
    if WAIT:
        gdc_wait()
    totals = (tl.zeros([WARPS, 32], tl.float32),) * ROWS
    for step in tl.static_range(STEPS):  # pyright: ignore[reportGeneralTypeIssues]
        word = (step * 128 + tl.arange(0, 128))[None, :]
        x = ()
        for pair in tl.static_range(4):  # pyright: ignore[reportGeneralTypeIssues]
            place = x_ptr + x_at[:, None] + (pair * WORDS + word)
            x += (_split_words(tl.load(place, mask=word < WORDS, other=0), WARPS),)
        factor = 1.0
        if BLOCK_FACTORS:
            group = (step * 32 + tl.arange(0, 32))[None, :]
            factor = tl.load(factors_ptr + group, mask=group < GROUPS, other=0.0)
        sums = ()
        for n in tl.static_range(ROWS):  # pyright: ignore[reportGeneralTypeIssues]
            exponent = scales[step * ROWS + n]
            scale = tl.where(exponent == 0, 0x400000, exponent << 23).to(tl.float32, bitcast=True)
            products = _multiply_group(words[step * ROWS + n], x, WARPS)
            sums += (totals[n] + products * (scale * factor),)
        totals = sums
    out = ()
    for n in tl.static_range(ROWS):  # pyright: ignore[reportGeneralTypeIssues]
        out += (tl.sum(totals[n], 1),)
    return out


@triton.jit
def _gate(gate, up, alpha, limit):
    """gpt-oss's gate of one pair of columns; propagates NaN."""
    gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
    return (up + 1.0) * gate / (1.0 + tl.exp(-alpha * gate))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gate_up_kernel(
    x_ptr, factors_ptr, indices_ptr, words_ptr, scales_ptr, bias_ptr, h_ptr, experts,
    alpha, limit, h_scale,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, GROUPS: tl.constexpr,
    WARPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write the gate's output times `h_scale`, h [entries, WIDE / 2], as words; h_ptr is int16.

    Grid: (entries, WIDE / ROWS / WARPS); ROWS, the rows per warp, is even. An index outside
    [0, experts) makes its row NaN.
    """
    entry = tl.program_id(0)
    row = (tl.program_id(1) * WARPS + tl.arange(0, WARPS)) * ROWS
    if PDL:  # the next kernel reads the indices before its own wait: launch it after ours
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.load(indices_ptr + entry).to(tl.int64)
    known = (expert >= 0) & (expert < experts)
    expert = tl.where(known, expert, 0)
    token = entry // TOP_K
    wide = _multiply_rows(
        x_ptr + token * GROUPS * 16, row * 0, factors_ptr + token * GROUPS, words_ptr, scales_ptr,
        expert * WIDE + row, row * 0 + expert * WIDE + (WIDE - 1), ROWS, GROUPS, WARPS, True,
        False,
    )  # fmt: skip
    for pair in tl.static_range(ROWS // 2):  # pyright: ignore[reportGeneralTypeIssues]
        at = row + 2 * pair
        place = bias_ptr + expert * WIDE + at
        gate = wide[2 * pair] + tl.load(place, mask=at < WIDE, other=0.0).to(tl.float32)
        up = wide[2 * pair + 1] + tl.load(place + 1, mask=at < WIDE, other=0.0).to(tl.float32)
        h = tl.where(known, _gate(gate, up, alpha, limit) * h_scale, float("nan"))
        at = at // 2
        place = ((at % 4) * (WIDE // 16) + at // 8) * 2 + (at % 8) // 4
        bits = h.to(tl.float16).to(tl.int16, bitcast=True)
        tl.store(h_ptr + entry * (WIDE // 2) + place, bits, mask=at < WIDE // 2)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def down_kernel(
    h_ptr, indices_ptr, weights_ptr, words_ptr, scales_ptr, bias_ptr, residual_ptr, out_ptr,
    experts, h_factor,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    WARPS: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write the weighted sum over each token's experts plus the residual, out [tokens, WIDTH].

    Grid: (tokens, WIDTH / ROWS). Each warp handles one expert of the token at a time, several in
    turn if TOP_K exceeds WARPS. `h_factor` undoes the scales of h and of the codes.
    """
    token = tl.program_id(0)
    row = tl.program_id(1) * ROWS
    if PDL:
        gdc_launch_dependents()
    out = (0.0,) * ROWS
    for first in tl.static_range(0, TOP_K, WARPS):  # pyright: ignore[reportGeneralTypeIssues]
        choice = first + tl.arange(0, WARPS)
        entry = token * TOP_K + choice
        # Read before our wait: gate_up launches this kernel only after its own wait, when the
        # routing is complete. Bypass L1, which may hold another layer's routing.
        expert = tl.load(
            indices_ptr + entry, mask=choice < TOP_K, other=0, cache_modifier=".cg"
        ).to(tl.int64)
        expert = tl.where((expert >= 0) & (expert < experts), expert, 0)  # h is NaN if out of range
        weight = tl.load(
            weights_ptr + entry, mask=choice < TOP_K, other=0.0, cache_modifier=".cg"
        ).to(tl.float32)
        entry = tl.minimum(entry, token * TOP_K + (TOP_K - 1))  # loaded, then masked
        y = _multiply_rows(
            h_ptr, entry * (GROUPS * 16), h_ptr, words_ptr, scales_ptr,
            expert * WIDTH + row, expert * WIDTH + (WIDTH - 1), ROWS, GROUPS, WARPS, False,
            PDL,
        )  # fmt: skip
        sums = ()
        for n in tl.static_range(ROWS):  # pyright: ignore[reportGeneralTypeIssues]
            at = tl.minimum(row + n, WIDTH - 1)
            bias = tl.load(bias_ptr + expert * WIDTH + at).to(tl.float32)
            product = tl.where(choice < TOP_K, (y[n] * h_factor + bias) * weight, 0.0)
            sums += (out[n] + tl.sum(product, 0),)
        out = sums
    for n in tl.static_range(ROWS):  # pyright: ignore[reportGeneralTypeIssues]
        if row + n < WIDTH:
            place = token * WIDTH + row + n
            result = out[n].to(out_ptr.dtype.element_ty)
            if RESIDUAL:
                result = result.to(tl.float32) + tl.load(residual_ptr + place).to(tl.float32)
            tl.store(out_ptr + place, result.to(out_ptr.dtype.element_ty))


def run_generation(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    stack: ExpertStack,
    gate: Gate,
) -> torch.Tensor:
    """Return the weighted sum of the outputs of each token's experts, [tokens, hidden].

    Args:
        x: bf16 [tokens, hidden], contiguous.
        indices: int32 or int64 [tokens, top_k], contiguous.
        weights: floating [tokens, top_k], contiguous.
        stack: the layer's packed weights and biases.
        gate: the gate's constants.
    """
    out = torch.empty_like(x)
    launch_experts(pack_words(x), indices, weights, stack, gate, out)
    return out


def launch_experts(
    words: tuple[torch.Tensor, torch.Tensor],
    indices: torch.Tensor,
    weights: torch.Tensor,
    stack: ExpertStack,
    gate: Gate,
    out: torch.Tensor,
    residual: torch.Tensor | None = None,
    h: torch.Tensor | None = None,
    pdl: bool = False,
) -> None:
    """Launch both kernels; write the weighted sum plus the residual to `out`.

    Args:
        words: the tokens' planes and factors from `pack_words` (`glue.py`).
        indices: int32 or int64 [tokens, top_k], contiguous.
        weights: floating [tokens, top_k], contiguous.
        stack: the layer's packed weights and biases.
        gate: the gate's constants.
        out: [tokens, hidden]; may alias `residual`.
        residual: [tokens, hidden], added to the sum.
        h: int32 [tokens * top_k, inner / 2], buffer for the gate's output; None allocates it.
        pdl: whether each launch may overlap the end of the previous one.
    """
    tokens, top_k = indices.shape
    gate_up, down = stack
    _, wide, groups, _ = gate_up.blocks.shape
    if h is None:
        h = torch.empty((indices.numel(), wide // 4), dtype=torch.int32, device=out.device)
    # |h| <= (limit + 1) * limit; scale it by the largest power of two that stays in fp16's range.
    exponent = math.floor(math.log2(32_768 / ((gate.limit + 1) * gate.limit)))
    launch: Any = {"TOP_K": top_k, "WARPS": TILE.warps, "PDL": pdl, "num_warps": TILE.warps}
    launch |= {"launch_pdl": True} if pdl else {}
    kernels: Any = (gate_up_kernel, down_kernel)  # triton's types do not cover launches
    kernels[0][(indices.numel(), -(-wide // (TILE.gate_up_rows * TILE.warps)))](
        *(*words, indices, gate_up.blocks.view(torch.int32), gate_up.scales, gate_up.bias),
        *(h.view(torch.int16), stack.experts, *gate, 2.0**exponent),
        ROWS=TILE.gate_up_rows, WIDE=wide, GROUPS=groups, **launch,
    )  # fmt: skip
    width = out.shape[-1]
    kernels[1][(tokens, -(-width // TILE.down_rows))](
        *(h, indices, weights, down.blocks.view(torch.int32), down.scales, down.bias),
        *(out if residual is None else residual, out),
        *(stack.experts, 2.0 ** (CODE_EXPONENT - exponent)),
        ROWS=TILE.down_rows, WIDTH=width, GROUPS=down.blocks.shape[2],
        RESIDUAL=residual is not None, **launch,
    )  # fmt: skip
