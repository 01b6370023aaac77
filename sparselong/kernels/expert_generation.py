"""The experts' pass for a few tokens, forward only: two kernels, no sorting, no tensor cores.

Generation reads the packed weights of the active experts and does little else, so what counts is
how many bytes are on their way at once. A program takes a few rows of an expert's weight, loads all
of their bytes together and keeps its products in registers: a thread holds groups of 32 weights
that share one scale, sums 32 products in fp32, and applies the scale to the sum. The first kernel
ends in the gate, the second in the weighted sum over a token's choices. Two tokens that choose the
same expert both go through its weight, the second time mostly from the cache.

Taken by name only ("generation"): compiled for sm_86 and sm_90 and checked in Triton's interpreter,
but not timed on a GPU yet, and the table of choices holds what was timed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from sparselong.kernels.expert_kernels import LOOK_UP_PTX

ENTRIES = 64
"""The most choices, tokens * top_k: every one goes through its expert's weight by itself."""


class GenerationTile(NamedTuple):
    """Weight rows of a program of either kernel, and its warps."""

    gate_up_rows: int
    down_rows: int
    warps: int


TILE = GenerationTile(4, 2, 1)


@triton.jit
def _multiply_rows(
    x_ptr, words_ptr, scales_ptr, row, rows, groups,
    ROWS: tl.constexpr, STEPS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """fp32 [ROWS], the products of x [groups * 32] with rows `row`... of one expert's weight."""
    lane = tl.arange(0, 32)
    at = (row + tl.arange(0, ROWS))[:, None]
    total = tl.zeros([ROWS, 32], tl.float32)
    for step in tl.static_range(STEPS):  # pyright: ignore[reportGeneralTypeIssues]
        word = (step * 128 + tl.arange(0, 128))[None, :]
        real = (at < rows) & (word < groups * 4)
        words = tl.load(words_ptr + at * (groups * 4) + word, mask=real, other=0)
        group = (step * 32 + lane)[None, :]
        real = (at < rows) & (group < groups)
        exponent = tl.load(scales_ptr + at * groups + group, mask=real, other=0).to(tl.int32)
        scale = tl.where(exponent == 0, 0x400000, exponent << 23).to(tl.float32, bitcast=True)
        quarter, value = tl.arange(0, 4)[:, None, None], tl.arange(0, 8)[None, None, :]
        group = (step * 32 + lane)[None, :, None]
        real = (group < groups) & (quarter < 4) & (value < 8)
        x = tl.load(x_ptr + group * 32 + quarter * 8 + value, mask=real, other=0.0)
        x = tl.permute(x, [1, 0, 2])[None, :, :, :].to(tl.float32)
        words = tl.reshape(words, [ROWS, 32, 4])
        if PTX:
            first, second, third, fourth = tl.inline_asm_elementwise(
                LOOK_UP_PTX, "=&r,=&r,=&r,=&r,r", [words],  # pyright: ignore[reportArgumentType]
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
            )  # fmt: skip
            pairs = tl.join(tl.join(first, third), tl.join(second, fourth))
            bits = tl.join(pairs << 16, pairs & -65536)  # a bf16 is the upper half of an fp32
            w = tl.reshape(bits, [ROWS, 32, 4, 8]).to(tl.float32, bitcast=True)
        else:
            shift = tl.reshape(tl.arange(0, 8) * 4, [1, 1, 1, 8])
            code = tl.reshape(words, [ROWS, 32, 4, 1]) >> shift
            bits = ((code & 7) << 22) | ((code & 8) << 28)
            w = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37
            w = tl.reshape(w, [ROWS, 32, 4, 8])
        total += tl.sum(tl.reshape(w * x, [ROWS, 32, 32]), 2) * scale
    return tl.sum(total, 1)


@triton.jit
def gate_up_kernel(
    x_ptr, indices_ptr, words_ptr, scales_ptr, bias_ptr, h_ptr, experts, rows, groups,
    alpha, limit,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """h [entries, rows / 2], the gate's output. Grid: (entries, rows / ROWS).

    An index that is no expert's makes its row NaN.
    """
    entry = tl.program_id(0)
    row = tl.program_id(1) * ROWS
    expert = tl.load(indices_ptr + entry).to(tl.int64)
    known = (expert >= 0) & (expert < experts)
    expert = tl.where(known, expert, 0)
    wide = _multiply_rows(
        x_ptr + (entry // TOP_K).to(tl.int64) * groups * 32,
        words_ptr + expert * rows * groups * 4, scales_ptr + expert * rows * groups,
        row, rows, groups, ROWS, STEPS, PTX,
    )  # fmt: skip
    at = row + tl.arange(0, ROWS)
    wide += tl.load(bias_ptr + expert * rows + at, mask=at < rows, other=0.0).to(tl.float32)
    gate, up = tl.split(tl.reshape(wide, [ROWS // 2, 2]))  # pyright: ignore[reportGeneralTypeIssues]
    gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
    h = (up + 1.0) * gate / (1.0 + tl.exp(-alpha * gate))
    h = tl.where(known, h, float("nan"))
    at = row // 2 + tl.arange(0, ROWS // 2)
    pointers = h_ptr + entry.to(tl.int64) * (rows // 2) + at
    tl.store(pointers, h.to(h_ptr.dtype.element_ty), mask=at < rows // 2)


@triton.jit
def down_kernel(
    h_ptr, indices_ptr, weights_ptr, words_ptr, scales_ptr, bias_ptr, out_ptr, experts, rows,
    groups,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """out [tokens, rows], the weighted sum of the choices. Grid: (tokens, rows / ROWS)."""
    token = tl.program_id(0)
    row = tl.program_id(1) * ROWS
    at = row + tl.arange(0, ROWS)
    out = tl.zeros([ROWS], tl.float32)
    for choice in tl.static_range(TOP_K):  # pyright: ignore[reportGeneralTypeIssues]
        entry = token * TOP_K + choice
        expert = tl.load(indices_ptr + entry).to(tl.int64)
        expert = tl.where((expert >= 0) & (expert < experts), expert, 0)  # h is NaN then
        y = _multiply_rows(
            h_ptr + entry.to(tl.int64) * groups * 32,
            words_ptr + expert * rows * groups * 4, scales_ptr + expert * rows * groups,
            row, rows, groups, ROWS, STEPS, PTX,
        )  # fmt: skip
        y += tl.load(bias_ptr + expert * rows + at, mask=at < rows, other=0.0).to(tl.float32)
        out += y * tl.load(weights_ptr + entry).to(tl.float32)
    pointers = out_ptr + token.to(tl.int64) * rows + at
    tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=at < rows)


def run_generation(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    down: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    gate: tuple[float, float],
) -> torch.Tensor:
    """out [tokens, hidden]; arguments as of `expert_triton.run_forward`, `gate` alpha and limit."""
    tokens, top_k = indices.shape
    indices = indices.contiguous()
    experts, wide, groups, _ = gate_up[0].shape
    h = torch.empty((indices.numel(), wide // 2), dtype=x.dtype, device=x.device)
    launch: Any = {
        "TOP_K": top_k,
        "PTX": has_ptx(x),
        "num_warps": TILE.warps,
    }
    kernels: Any = (gate_up_kernel, down_kernel)  # triton's own types know no launch
    kernels[0][(indices.numel(), -(-wide // TILE.gate_up_rows))](
        *(x, indices, gate_up[0].view(torch.int32), *gate_up[1:], h, experts, wide, groups, *gate),
        ROWS=TILE.gate_up_rows, STEPS=-(-groups // 32), **launch,
    )  # fmt: skip
    groups = down[0].shape[2]
    out = torch.empty_like(x)
    kernels[1][(tokens, -(-x.shape[1] // TILE.down_rows))](
        *(h, indices, weights, down[0].view(torch.int32), *down[1:], out),
        *(experts, x.shape[1], groups),
        ROWS=TILE.down_rows, STEPS=-(-groups // 32), **launch,
    )  # fmt: skip
    return out


def has_ptx(x: torch.Tensor) -> bool:
    """Whether codes are looked up by PTX: everywhere but in Triton's interpreter."""
    return x.device.type == "cuda"
