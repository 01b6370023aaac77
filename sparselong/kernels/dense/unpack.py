"""Unpack a dense int4 weight, with or without 2:4, to bf16 on a GPU in one pass over memory.

Training and prompts multiply many rows by the weight, so it pays to decode it once for all of them
and to leave the product to cuBLAS (`model/packed_linear.py`). A program takes a tile of rows and
blocks of 32 inputs. The pattern of four inputs tells for each whether it is kept, and whether it is
the first or the second of the two kept, which locates its code. The values equal those of
`packing/dense.py`, the reference, bit for bit. Not supported: 8 and 16 bits, which plain torch
unpacks. The code is ours, under this repository's licence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparselong.kernels.decode import Matrix, as_matrix
from sparselong.kernels.dense.masked_weight_triton import PATTERN_MASKS
from sparselong.kernels.launch import launch
from sparselong.packing import DenseFormat

UNPACK_ROWS, UNPACK_BLOCKS = 8, 8


@triton.jit
def unpack_kernel(
    out_ptr, codes_ptr, patterns_ptr, scales_ptr, rows, BLOCKS: tl.constexpr,
    GROUP: tl.constexpr, SPARSE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write the bf16 weight [rows, BLOCKS * 32]; codes_ptr counts bytes. Grid: (blocks, rows)."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(0) * TILE + tl.arange(0, TILE)
    lane = tl.arange(0, 32)[None, None, :]
    real = (row < rows)[:, None] & (block < BLOCKS)[None, :]
    at = row[:, None] * BLOCKS + block[None, :]
    inside = real[:, :, None] & (lane < 32)
    if SPARSE:
        word = tl.load(patterns_ptr + at * 3, mask=real, other=0).to(tl.int32)
        word |= tl.load(patterns_ptr + at * 3 + 1, mask=real, other=0).to(tl.int32) << 8
        word |= tl.load(patterns_ptr + at * 3 + 2, mask=real, other=0).to(tl.int32) << 16
        mask = PATTERN_MASKS >> (4 * ((word[:, :, None] >> (lane // 4 * 3)) & 7))
        kept = (mask >> (lane % 4)) & 1
        # An input is the second of the two if a lower one is kept.
        second = (mask & ((1 << (lane % 4)) - 1)) & 0xF
        nibble = tl.where(second != 0, 4, 0)
        byte = at[:, :, None] * 8 + lane // 4
    else:
        kept = lane * 0 + 1
        nibble = lane % 2 * 4
        byte = at[:, :, None] * 16 + lane // 2
    codes = tl.load(codes_ptr + byte, mask=inside, other=0).to(tl.int32)
    code = (((codes >> nibble) & 15) ^ 8) - 8
    scale = tl.load(
        scales_ptr + row[:, None] * (BLOCKS // GROUP) + (block // GROUP)[None, :],
        mask=real,
        other=0,
    )
    scale = (scale.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    weight = tl.where(kept != 0, code.to(tl.float32) * scale[:, :, None], 0.0)
    place = out_ptr + at[:, :, None] * 32 + lane
    tl.store(place, weight.to(out_ptr.dtype.element_ty), mask=inside)


def launch_unpack(matrix: Matrix, out: torch.Tensor) -> None:
    """Decode a weight into out [rows, in]; patterns were checked when stored and are trusted."""
    rows, width = out.shape
    blocks = width // 32
    launch(
        unpack_kernel,
        (-(-blocks // UNPACK_BLOCKS), -(-rows // UNPACK_ROWS)),
        *(out, matrix.codes.view(torch.uint8), matrix.patterns, matrix.scales, rows),
        BLOCKS=blocks,
        GROUP=blocks // matrix.scales.shape[1],
        SPARSE=matrix.patterns is not matrix.codes,
        ROWS=UNPACK_ROWS,
        TILE=UNPACK_BLOCKS,
        num_warps=4,
    )


def unpack_weight(fmt: DenseFormat, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return a 4-bit weight as bf16 [out, in] on a GPU, bit for bit as `packing.dense.unpack`.

    One kernel launch, no memory besides the result and no host synchronization. A damaged pattern,
    which `dense.unpack` refuses, therefore reads as four zeros here.

    Raises:
        ValueError: the format does not have 4 bits.
    """
    matrix = as_matrix(fmt, tensors, tensors["weight_scale"])  # a bias is not read
    width = matrix.scales.shape[1] * fmt.group_size
    scales = matrix.scales
    out = torch.empty((len(scales), width), dtype=torch.bfloat16, device=scales.device)
    with torch.cuda.device_of(out):
        launch_unpack(matrix, out)
    return out
