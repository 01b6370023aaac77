"""Sum of partial results in Triton (`parts.py`): each part is read once, in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparselong.kernels.launch import launch

BLOCK = 2048


@triton.jit
def add_parts_kernel(
    parts_ptr, out_ptr, numel, PARTS: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Add PARTS tensors of `numel` values in fp32, with EXACT in fp64. Grid: numel / BLOCK."""
    SUM: tl.constexpr = tl.float64 if EXACT else tl.float32  # pyright: ignore[reportAssignmentType]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < numel
    pointers = parts_ptr + at
    total = tl.load(pointers, mask=real, other=0.0).to(SUM)
    for _ in tl.static_range(1, PARTS):  # pyright: ignore[reportGeneralTypeIssues]
        pointers += numel
        total += tl.load(pointers, mask=real, other=0.0).to(SUM)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=real)


def add_parts(parts: torch.Tensor, out: torch.Tensor) -> None:
    """Add parts [parts, rows, width] in order; arguments as in `sum_parts`."""
    if not out.numel():
        return
    with torch.cuda.device_of(out):
        launch(
            add_parts_kernel,
            (-(-out.numel() // BLOCK),),
            parts,
            out,
            out.numel(),
            PARTS=len(parts),
            EXACT=parts.dtype == torch.float64,
            BLOCK=BLOCK,
        )
