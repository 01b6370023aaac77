"""Triton kernels that read expert weights: decoding and the two products (`triton_launch.py`).

Rows (one per routed token) are sorted by expert. A product is split into tiles of ROWS by COLUMNS,
none of which spans two experts. A fixed number of programs iterates over them, visiting all row
tiles of a column tile consecutively, so that the weight is read from memory once. An expert's first
row and its number of row tiles come from device arrays written by `routing.py`; the host knows only
an upper bound.

`dense_kernel` multiplies by weights that `decode_kernel` expanded into a buffer, whose first expert
is `first_expert`. `packed_kernel` decodes the tiles it needs itself. Both compute the forward
product (out[r, n] = sum_k a[r, k] W[n, k] + bias[n]) or, with BACKWARD, the input's gradient
(out[r, k] = sum_n a[r, n] W[n, k]). Sums are in fp32 in a fixed order, so results are bitwise
reproducible. Offsets into tensors that grow with tokens or experts are int64.

Decoding is exact: a value times a power of two in bf16, whose instructions keep subnormals. On a
GPU it is written in PTX at under three instructions per weight; the compiler would decode each code
separately with ten. In fp32, and in Triton's interpreter, a code's sign goes to bit 31 and its
magnitude to bits 22-24, which is the value times 2^-126 (`packing/mxfp4.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

# Decodes a word of eight codes, $4, to four words of two bf16 values each. prmt selects bytes by
# nibbles, so the codes themselves look up the high and low bytes of their magnitudes. If a nibble's
# top bit is set, prmt replicates the top bit of the selected byte instead, which separates negative
# codes (0xFF) from positive ones (0x80).
_LOOK_UP = """
.reg .b32 code, upper, high, low, sign, top;
mov.b32 top, 0x80808080;
and.b32 code, $4, 0x77777777;
prmt.b32 high, 0x3F3F3F00, 0x40404040, code;
prmt.b32 low, 0xC0800000, 0xC0804000, code;
prmt.b32 sign, top, top, $4;
shl.b32 sign, sign, 7;
lop3.b32 high, sign, top, high, 0xEA;
prmt.b32 $0, low, high, 0x5140;
prmt.b32 $1, low, high, 0x7362;
shr.u32 code, code, 16;
shr.u32 upper, $4, 16;
prmt.b32 high, 0x3F3F3F00, 0x40404040, code;
prmt.b32 low, 0xC0800000, 0xC0804000, code;
prmt.b32 sign, top, top, upper;
shl.b32 sign, sign, 7;
lop3.b32 high, sign, top, high, 0xEA;
prmt.b32 $2, low, high, 0x5140;
prmt.b32 $3, low, high, 0x7362;
"""
# $5: the scale, twice. The addend is -0, which preserves negative zeros.
_SCALE = """
.reg .b32 zero;
mov.b32 zero, 0x80008000;
fma.rn.bf16x2 $0, $0, $5, zero;
fma.rn.bf16x2 $1, $1, $5, zero;
fma.rn.bf16x2 $2, $2, $5, zero;
fma.rn.bf16x2 $3, $3, $5, zero;
"""
LOOK_UP_PTX = tl.constexpr("{" + _LOOK_UP + "}")
DECODE_PTX = tl.constexpr("{" + _LOOK_UP + _SCALE + "}")
UNSPECIALIZED = ["first_expert", "last_expert"]


@triton.jit
def _decode(words, scales, PTX: tl.constexpr):
    """Decode words [A, 4 G] of eight codes and scales [A, G] to [A, 32 G]; fp32 without PTX."""
    A: tl.constexpr = scales.shape[0]
    G: tl.constexpr = scales.shape[1]
    words = tl.reshape(words, [A, G, 4])
    exponent = scales.to(tl.int32)
    if PTX:
        bits = tl.where(exponent == 0, 0x40, exponent << 7)
        factor = tl.reshape(bits | (bits << 16), [A, G, 1])
        first, second, third, fourth = tl.inline_asm_elementwise(
            DECODE_PTX, "=&r,=&r,=&r,=&r,r,r",  # pyright: ignore[reportArgumentType]
            [words, tl.broadcast_to(factor, [A, G, 4])],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        pairs = tl.join(tl.join(first, third), tl.join(second, fourth))
        low = pairs.to(tl.int16).to(tl.bfloat16, bitcast=True)
        high = (pairs >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        values = tl.join(low, high)
    else:
        bits = tl.where(exponent == 0, 0x400000, exponent << 23)
        factor = tl.reshape(bits.to(tl.float32, bitcast=True), [A, G, 1, 1])
        shift = tl.reshape(tl.arange(0, 8) * 4, [1, 1, 1, 8])
        code = tl.reshape(words, [A, G, 4, 1]) >> shift
        bits = ((code & 7) << 22) | ((code & 8) << 28)
        values = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37 * factor
    return tl.reshape(values, [A, 32 * G])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def decode_kernel(
    words_ptr, scales_ptr, out_ptr, groups, tile_starts_ptr, first_expert, last_expert,
    GROUPS: tl.constexpr, TURNS: tl.constexpr, PTX: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Expand groups of 32 weights in TURNS steps. Grid: groups / (GROUPS * TURNS).

    With PARTIAL nothing is done if experts [first_expert, last_expert) have no row tiles.
    """
    if PARTIAL:
        begin = tl.load(tile_starts_ptr + first_expert)
        if begin == tl.load(tile_starts_ptr + last_expert):
            return
    first = tl.program_id(0).to(tl.int64) * (GROUPS * TURNS)
    word = tl.arange(0, 4)
    value = tl.arange(0, 32)
    for turn in tl.static_range(TURNS):  # pyright: ignore[reportGeneralTypeIssues]
        group = first + turn * GROUPS + tl.arange(0, GROUPS)
        real = group < groups
        words = tl.load(words_ptr + group[:, None] * 4 + word[None, :], mask=real[:, None])
        scales = tl.load(scales_ptr + group, mask=real, other=127)
        values = _decode(words, scales[:, None], PTX).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + group[:, None] * 32 + value[None, :], values, mask=real[:, None])


@triton.jit
def _locate(
    tile, columns, starts_ptr, tile_expert_ptr, tile_starts_ptr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return a tile's expert, its first row, the end of the expert's rows, and its first column."""
    column_tiles = tl.cdiv(columns, COLUMNS)
    expert = tl.load(tile_expert_ptr + tile // column_tiles)
    first = tl.load(tile_starts_ptr + expert)
    row_tiles = tl.load(tile_starts_ptr + expert + 1) - first
    local = tile - first * column_tiles
    row = tl.load(starts_ptr + expert) + local % row_tiles * ROWS
    return expert, row, tl.load(starts_ptr + expert + 1), local // row_tiles * COLUMNS


@triton.jit
def _load_a(a, row, end, k, depth, ROWS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr):
    """Load a[row : row + ROWS, k : k + DEPTH]; with TMA, rows past `end` are the next expert's."""
    if TMA:
        tile = a.load([row, k])
    else:
        rows = row + tl.arange(0, ROWS)
        at = k + tl.arange(0, DEPTH)
        pointers = a + rows.to(tl.int64)[:, None] * depth + at[None, :]
        tile = tl.load(pointers, mask=(rows < end)[:, None] & (at < depth)[None, :], other=0.0)
    return tile


@triton.jit
def _store(
    acc, out_ptr, bias_ptr, expert, row, end, column, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    rows = row + tl.arange(0, ROWS)
    at = column + tl.arange(0, COLUMNS)
    if BIAS:
        bias = tl.load(bias_ptr + expert.to(tl.int64) * columns + at, mask=at < columns, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    pointers = out_ptr + rows.to(tl.int64)[:, None] * columns + at[None, :]
    keep = (rows < end)[:, None] & (at < columns)[None, :]
    tl.store(pointers, acc.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def dense_kernel(
    a, w, bias_ptr, out_ptr, starts_ptr, tile_expert_ptr, tile_starts_ptr,
    first_expert, last_expert, columns, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BACKWARD: tl.constexpr,
    BIAS: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the product for experts [first_expert, last_expert) from decoded weights.

    a: [rows, depth]; out: [rows, columns]; w: [experts, columns, depth], with BACKWARD
    [experts, depth, columns], starting at first_expert. With TMA, a and w are tensor descriptors.
    Any grid.
    """
    column_tiles = tl.cdiv(columns, COLUMNS)
    begin = tl.load(tile_starts_ptr + first_expert) * column_tiles
    finish = tl.load(tile_starts_ptr + last_expert) * column_tiles
    for tile in tl.range(begin + tl.program_id(0), finish, tl.num_programs(0)):
        expert, row, end, column = _locate(
            tile, columns, starts_ptr, tile_expert_ptr, tile_starts_ptr, ROWS, COLUMNS
        )
        local = expert - first_expert
        at = column + tl.arange(0, COLUMNS)
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, depth, DEPTH):
            a_tile = _load_a(a, row, end, k, depth, ROWS, DEPTH, TMA)
            if TMA and BACKWARD:
                w_tile = tl.reshape(w.load([local, k, column]), [DEPTH, COLUMNS])
            elif TMA:
                w_tile = tl.trans(tl.reshape(w.load([local, column, k]), [COLUMNS, DEPTH]))
            else:
                inner = k + tl.arange(0, DEPTH)
                base = w + local.to(tl.int64) * columns * depth
                if BACKWARD:
                    pointers = base + inner[:, None] * columns + at[None, :]
                else:
                    pointers = base + at[None, :] * depth + inner[:, None]
                real = (inner < depth)[:, None] & (at < columns)[None, :]
                w_tile = tl.load(pointers, mask=real, other=0.0)
            acc = tl.dot(a_tile, w_tile, acc, input_precision=PRECISION)
        _store(
            acc, out_ptr, bias_ptr, expert, row, end, column, columns, ROWS, COLUMNS, BIAS
        )  # fmt: skip


@triton.jit
def _load_packed(
    words, scales, row, rows, group, groups, A: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """Load words [A, 4 G] and scales [A, G] of one expert, zeros out of bounds."""
    at = row + tl.arange(0, A)
    word = group * 4 + tl.arange(0, 4 * G)
    real = (at < rows)[:, None] & (word < groups * 4)[None, :]
    packed = tl.load(words + at[:, None] * (groups * 4) + word[None, :], mask=real, other=0)
    unit = group + tl.arange(0, G)
    real = (at < rows)[:, None] & (unit < groups)[None, :]
    return packed, tl.load(scales + at[:, None] * groups + unit[None, :], mask=real, other=0)


@triton.jit
def packed_kernel(
    a, words_ptr, scales_ptr, bias_ptr, out_ptr, starts_ptr, tile_expert_ptr, tile_starts_ptr,
    experts, columns, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BACKWARD: tl.constexpr,
    BIAS: tl.constexpr, TMA: tl.constexpr, PTX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the product for all experts, decoding weights in the kernel.

    The next step's blocks and scales are loaded while this step's are decoded and multiplied.
    Shapes as in `dense_kernel`, but words of 8 codes: [experts, columns, depth / 8], with BACKWARD
    [experts, depth, columns / 8].
    """
    finish = tl.load(tile_starts_ptr + experts) * tl.cdiv(columns, COLUMNS)
    for tile in tl.range(tl.program_id(0), finish, tl.num_programs(0)):
        expert, row, end, column = _locate(
            tile, columns, starts_ptr, tile_expert_ptr, tile_starts_ptr, ROWS, COLUMNS
        )
        offset = expert.to(tl.int64) * columns * depth
        words, scales = words_ptr + offset // 8, scales_ptr + offset // 32
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        if BACKWARD:
            packed, unit = _load_packed(
                *(words, scales, 0, depth, column // 32, columns // 32, DEPTH, COLUMNS // 32)
            )
        else:
            packed, unit = _load_packed(
                *(words, scales, column, columns, 0, depth // 32, COLUMNS, DEPTH // 32)
            )
        for k in range(0, depth, DEPTH):
            a_tile = _load_a(a, row, end, k, depth, ROWS, DEPTH, TMA)
            after = k + DEPTH
            if BACKWARD:
                next_packed, next_unit = _load_packed(
                    words, scales, after, depth, column // 32, columns // 32, DEPTH, COLUMNS // 32
                )
            else:
                next_packed, next_unit = _load_packed(
                    words, scales, column, columns, after // 32, depth // 32, COLUMNS, DEPTH // 32
                )
            w_tile = _decode(packed, unit, PTX).to(a_tile.dtype)
            if not BACKWARD:
                w_tile = tl.trans(w_tile)
            acc = tl.dot(a_tile, w_tile, acc, input_precision=PRECISION)
            packed, unit = next_packed, next_unit
        _store(
            acc, out_ptr, bias_ptr, expert, row, end, column, columns, ROWS, COLUMNS, BIAS
        )  # fmt: skip
