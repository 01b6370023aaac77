"""One row times a packed dense weight (int4, with or without 2:4), reading each packed byte once.

Generation multiplies one token by every weight, so its cost is the weight's bytes and then the
instructions that decode them. A warp takes a few rows of the weight; a lane takes blocks of 32
inputs, whose codes, patterns and scale it loads and decodes in registers:

- a pattern (3 bits) names the two of four inputs that are kept. Two byte permutations look up which
  bytes of the four inputs these are, and a third selects them: no branch, no table in memory;
- two codes become two bf16 numbers by placing their bits under the exponent of 128;
- code times scale is rounded to bf16 once, which is the weight as `packing/integer.py` defines it.
  Products with x and their sums are fp32.

x is stored as *planes*: bf16 pairs (x[32 b + 2 i], x[32 b + 2 i + 1]) at [i, b], so that the lanes
of a warp read adjacent words. Kernels that produce x store it this way (`glue.py`). For many rows
of x, `kernels/dense/unpack.py` decodes the whole weight once instead.

With `PDL` (programmatic dependent launch, sm_90) a program loads its weights before it waits for
the kernel that produces x, and lets the next kernel do the same. Several matrices that multiply the
same x (q, k and v) share one launch.
The reference is `tests/references/packed_gemv.py`; source and licence: ours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparselong.packing import DenseFormat

ROWS, WARPS = 2, 2
"""Rows of the weight per program, and the warps that share them."""


class Matrix(NamedTuple):
    """A packed weight [rows, in] on the GPU in the kernel's form.

    Attributes:
        codes: int64, 16 codes per element: [rows, in / 32] with 2:4, [rows, in / 16] without.
        patterns: uint8 [rows, in / 32 · 3]; without 2:4, `codes` as an unused stand-in.
        scales: bits of bf16 as int16, [rows, in / group].
        bias: [rows].
    """

    codes: torch.Tensor
    patterns: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor


def as_matrix(
    fmt: DenseFormat, tensors: dict[str, torch.Tensor], bias: torch.Tensor | None
) -> Matrix:
    """Return views of a layer's stored tensors; a missing bias is replaced by zeros.

    Raises:
        ValueError: the format does not have 4 bits.
    """
    if fmt.weight_bits != 4:
        raise ValueError(f"weight_bits: {fmt.weight_bits}; allowed here: 4")
    codes = tensors["weight_packed"].view(torch.int64)
    scales = tensors["weight_scale"]
    if bias is None:
        bias = torch.zeros(codes.shape[0], dtype=scales.dtype, device=codes.device)
    return Matrix(
        codes,
        tensors["weight_mask"] if fmt.is_sparse else codes,
        scales.view(torch.int16),
        bias,
    )


def _multiply_pair(pair: str, x: str) -> str:
    """Return PTX that adds two codes times scale times two inputs to acc.

    `pair` holds codes plus 8 in bits 0-3 and 16-19; $SCALE and `x` are bf16 pairs.
    """
    return f"""
lop3.b32 v, {pair}, 0x000F000F, magic, 0xEA;
fma.rn.bf16x2 v, v, one, less;
fma.rn.bf16x2 v, v, $SCALE, zero;
shl.b32 a, v, 16;
shl.b32 b, {x}, 16;
fma.rn.f32 acc, a, b, acc;
and.b32 a, v, 0xFFFF0000;
and.b32 b, {x}, 0xFFFF0000;
fma.rn.f32 acc, a, b, acc;
"""


_REGISTERS = """
.reg .b32 magic, one, less, zero, word, upper, v, a, b, acc, t, u, p, low, high, sel, x;
mov.b32 magic, 0x43004300;
mov.b32 one, 0x3F803F80;
mov.b32 less, 0xC308C308;
mov.b32 zero, 0x80008000;
mov.b32 acc, 0;
"""
_SPREAD = """
and.b32 t, $PATTERNS, 0xFFF;
and.b32 u, $PATTERNS, 0xFFF000;
shl.b32 u, u, 4;
lop3.b32 p, t, u, 0, 0xFC;
shl.b32 u, p, 2;
and.b32 u, u, 0x3F003F00;
lop3.b32 p, p, 0x003F003F, u, 0xEA;
shl.b32 u, p, 1;
and.b32 u, u, 0x70707070;
lop3.b32 p, p, 0x07070707, u, 0xEA;
"""
"""Spreads eight patterns of three bits to eight of four."""


def _sparse_ptx() -> str:
    """Return PTX of the sum over a block with 2:4.

    $0: the sum; $1, $2: codes; $3: patterns; $4: scale twice; $5 ...: input pairs.
    """
    text = _REGISTERS + _SPREAD
    for half in range(2):
        text += f"lop3.b32 word, ${1 + half}, 0x88888888, 0, 0x3C;\nshr.u32 upper, word, 4;\n"
        text += "" if half == 0 else "shr.u32 p, p, 16;\n"
        # Bytes of the first and of the second kept input, for the patterns (0,1) (0,2) (0,3) (1,2)
        # (1,3) (2,3): input i is bytes 2 i and 2 i + 1.
        text += "prmt.b32 low, 0x32101010, 0x00005432, p;\n"
        text += "prmt.b32 high, 0x54765432, 0x00007676, p;\n"
        for group in range(4):
            first = 5 + 2 * (4 * half + group)
            text += f"prmt.b32 sel, low, high, {group | (4 + group) << 4:#06x};\n"
            text += f"prmt.b32 x, ${first}, ${first + 1}, sel;\n"
            text += f"prmt.b32 t, word, upper, {group | (4 + group) << 8:#06x};"
            text += _multiply_pair("t", "x")
    return _finish(text, "$4", "$3")


def _dense_ptx() -> str:
    """Return PTX of the sum over a block without 2:4.

    $0: the sum; $1 ... $4: codes; $5: scale twice; $6 ...: input pairs.
    """
    text = _REGISTERS
    for word in range(4):
        text += f"lop3.b32 word, ${1 + word}, 0x88888888, 0, 0x3C;\nshr.u32 upper, word, 4;\n"
        for byte in range(4):
            text += f"prmt.b32 t, word, upper, {byte | (4 + byte) << 8:#06x};"
            text += _multiply_pair("t", f"${6 + 4 * word + byte}")
    return _finish(text, "$5", "")


def _finish(text: str, scale: str, patterns: str) -> str:
    text += "mov.b32 $0, acc;\n"
    return "{" + text.replace("$SCALE", scale).replace("$PATTERNS", patterns) + "}"


SPARSE_PTX = tl.constexpr(_sparse_ptx())
DENSE_PTX = tl.constexpr(_dense_ptx())
SPARSE_CONSTRAINTS = tl.constexpr("=f" + ",r" * 20)
DENSE_CONSTRAINTS = tl.constexpr("=f" + ",r" * 21)
UNSPECIALIZED = ["rows_1", "rows_2", "rows_3"]


@triton.jit
def _load_row(
    codes_ptr, patterns_ptr, scales_ptr, row, block,
    BLOCKS: tl.constexpr, GROUP: tl.constexpr, SPARSE: tl.constexpr,
):  # fmt: skip
    """Load codes, patterns (without 2:4 the second half of codes) and scale of a row's blocks."""
    real = block < BLOCKS
    at = row * BLOCKS + block
    scale = tl.load(scales_ptr + row * (BLOCKS // GROUP) + block // GROUP, mask=real, other=0)
    scale = scale.to(tl.int32) & 0xFFFF
    if SPARSE:
        codes = tl.load(codes_ptr + at, mask=real, other=0, eviction_policy="evict_first")
        first = tl.load(patterns_ptr + at * 3, mask=real, other=0).to(tl.int32)
        second = tl.load(patterns_ptr + at * 3 + 1, mask=real, other=0).to(tl.int32)
        third = tl.load(patterns_ptr + at * 3 + 2, mask=real, other=0).to(tl.int32)
        return codes, first | (second << 8) | (third << 16), scale | (scale << 16)
    else:
        codes = tl.load(codes_ptr + at * 2, mask=real, other=0, eviction_policy="evict_first")
        rest = tl.load(codes_ptr + at * 2 + 1, mask=real, other=0, eviction_policy="evict_first")
        return codes, rest, scale | (scale << 16)


@triton.jit
def _multiply_row(loaded, x, SPARSE: tl.constexpr):
    """Return fp32 [lanes], each lane's sum of products over one block of a row."""
    codes, patterns, scale = loaded
    low, high = codes.to(tl.int32), (codes >> 32).to(tl.int32)
    if SPARSE:
        return tl.inline_asm_elementwise(
            SPARSE_PTX, SPARSE_CONSTRAINTS,  # pyright: ignore[reportArgumentType]
            (low, high, patterns, scale) + x, dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        third, fourth = patterns.to(tl.int32), (patterns >> 32).to(tl.int32)
        return tl.inline_asm_elementwise(
            DENSE_PTX, DENSE_CONSTRAINTS,  # pyright: ignore[reportArgumentType]
            (low, high, third, fourth, scale) + x, dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _multiply_rows(
    x_ptr, codes_ptr, patterns_ptr, scales_ptr, row, rows,
    ROWS: tl.constexpr, LANES: tl.constexpr, BLOCKS: tl.constexpr, GROUP: tl.constexpr,
    SPARSE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Multiply x [BLOCKS * 32] by ROWS rows of the weight from `row` on.

    Returns ROWS tensors, fp32 [LANES], each still to be summed over lanes. A lane takes every
    LANES-th block; LANES / 32 warps share a row.
    """
    STEPS: tl.constexpr = (BLOCKS + LANES - 1) // LANES
    lane = tl.arange(0, LANES)
    loaded = ()
    for step in tl.static_range(STEPS):  # pyright: ignore[reportGeneralTypeIssues]
        for n in tl.static_range(ROWS):  # pyright: ignore[reportGeneralTypeIssues]
            at = tl.minimum(row + n, rows - 1)
            loaded += (_load_row(
                codes_ptr, patterns_ptr, scales_ptr, at, step * LANES + lane, BLOCKS, GROUP, SPARSE
            ),)  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    totals = (tl.zeros([LANES], tl.float32),) * ROWS
    for step in tl.static_range(STEPS):  # pyright: ignore[reportGeneralTypeIssues]
        block = step * LANES + lane
        x = ()
        for pair in tl.static_range(16):  # pyright: ignore[reportGeneralTypeIssues]
            x += (tl.load(x_ptr + pair * BLOCKS + block, mask=block < BLOCKS, other=0),)
        sums = ()
        for n in tl.static_range(ROWS):  # pyright: ignore[reportGeneralTypeIssues]
            sums += (totals[n] + _multiply_row(loaded[step * ROWS + n], x, SPARSE),)
        totals = sums
    return totals


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gemv_kernel(
    x_ptr, out_ptr, residual_ptr,
    codes_1_ptr, patterns_1_ptr, scales_1_ptr, bias_1_ptr,
    codes_2_ptr, patterns_2_ptr, scales_2_ptr, bias_2_ptr,
    codes_3_ptr, patterns_3_ptr, scales_3_ptr, bias_3_ptr,
    rows_1, rows_2, rows_3,
    ROWS: tl.constexpr, LANES: tl.constexpr, BLOCKS: tl.constexpr, GROUP: tl.constexpr,
    SPARSE: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write out [tokens, rows of all three], plus residual. Grid: (tiles of all three, tokens)."""
    tile, token = tl.program_id(0), tl.program_id(1)
    tiles_1, tiles_2 = tl.cdiv(rows_1, ROWS), tl.cdiv(rows_2, ROWS)
    codes_ptr, patterns_ptr, scales_ptr, bias_ptr = (
        codes_1_ptr, patterns_1_ptr, scales_1_ptr, bias_1_ptr
    )  # fmt: skip
    rows, before, row = rows_1, 0, tile * ROWS
    if tile >= tiles_1:
        codes_ptr, patterns_ptr, scales_ptr, bias_ptr = (
            codes_2_ptr, patterns_2_ptr, scales_2_ptr, bias_2_ptr
        )  # fmt: skip
        rows, before, row = rows_2, rows_1, (tile - tiles_1) * ROWS
    if tile >= tiles_1 + tiles_2:
        codes_ptr, patterns_ptr, scales_ptr, bias_ptr = (
            codes_3_ptr, patterns_3_ptr, scales_3_ptr, bias_3_ptr
        )  # fmt: skip
        rows, before, row = rows_3, rows_1 + rows_2, (tile - tiles_1 - tiles_2) * ROWS
    totals = _multiply_rows(
        x_ptr + token * BLOCKS * 16, codes_ptr, patterns_ptr, scales_ptr, row, rows,
        ROWS, LANES, BLOCKS, GROUP, SPARSE, PDL,
    )  # fmt: skip
    for n in tl.static_range(ROWS):  # pyright: ignore[reportGeneralTypeIssues]
        if row + n < rows:
            out = tl.sum(totals[n], 0) + tl.load(bias_ptr + row + n).to(tl.float32)
            out = out.to(out_ptr.dtype.element_ty)
            place = token * (rows_1 + rows_2 + rows_3) + before + row + n
            if RESIDUAL:
                out = out.to(tl.float32) + tl.load(residual_ptr + place).to(tl.float32)
            tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty))


def launch_gemv(
    planes: torch.Tensor,
    matrices: tuple[Matrix, ...],
    out: torch.Tensor,
    residual: torch.Tensor | None = None,
    pdl: bool = False,
) -> None:
    """Write one to three products of the same x next to each other.

    Args:
        planes: int32 [tokens, 16, in / 32], see the module's docstring.
        matrices: weights with `in` inputs, of one format.
        out: [tokens, rows of all matrices], contiguous; may be `residual` itself.
        residual: added to the rounded product.
        pdl: whether the launch overlaps the end of the previous kernel.
    """
    blocks = planes.shape[-1]
    sparse = matrices[0].patterns is not matrices[0].codes
    rows = [matrix.scales.shape[0] for matrix in matrices] + [0, 0]
    arguments: list[Any] = [*matrices, *(matrices[0] for _ in range(3 - len(matrices)))]
    kernel: Any = gemv_kernel  # Triton's type hints do not cover launches
    tiles = sum(-(-count // ROWS) for count in rows[: len(matrices)])
    kernel[(tiles, planes.shape[0])](
        *(planes, out, out if residual is None else residual),
        *(tensor for matrix in arguments for tensor in matrix),
        *rows[:3],
        ROWS=ROWS,
        LANES=32 * WARPS,
        BLOCKS=blocks,
        GROUP=blocks // matrices[0].scales.shape[1],
        SPARSE=sparse,
        RESIDUAL=residual is not None,
        PDL=pdl,
        num_warps=WARPS,
        **({"launch_pdl": True} if pdl else {}),
    )


def packed_gemv(
    x: torch.Tensor,
    fmt: DenseFormat,
    tensors: dict[str, torch.Tensor],
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Return x Wᵀ + bias for a few rows of x; forward only.

    Args:
        x: bf16 [tokens, in] on a GPU; each row reads the weight, from the cache after the first.
        fmt: 4 bits, with or without 2:4.
        tensors: the stored weight [out, in] (`packing/dense.py`).
        bias: [out] or None.

    Returns:
        bf16 [tokens, out]: exact products with the bf16 weight that the tensors encode, summed in
        fp32, rounded once (tests/gpu/test_generation.py).

    Raises:
        ValueError: x or the format is not as above.
    """
    from sparselong.kernels.decode.glue import pack_pairs

    if not x.is_cuda or x.dtype != torch.bfloat16 or x.dim() != 2:
        raise ValueError(
            f"x: {x.dtype} {list(x.shape)} on {x.device.type}; allowed: torch.bfloat16 "
            "[tokens, in] on cuda"
        )
    matrix = as_matrix(fmt, tensors, bias)
    out = torch.empty((len(x), matrix.scales.shape[0]), dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        launch_gemv(pack_pairs(x.contiguous()), (matrix,), out)
    return out
