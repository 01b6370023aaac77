"""Sum of partial results in Triton (`parts.py`): each part is read once, in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparselong.kernels.launch import launch

BLOCK = 2048


@triton.jit
def add_parts_kernel(parts_ptr, out_ptr, numel, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Add PARTS tensors of `numel` values in fp32. Grid: numel / BLOCK."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < numel
    pointers = parts_ptr + at
    total = tl.load(pointers, mask=real, other=0.0).to(tl.float32)
    for _ in tl.static_range(1, PARTS):  # pyright: ignore[reportGeneralTypeIssues]
        pointers += numel
        total += tl.load(pointers, mask=real, other=0.0).to(tl.float32)
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
            BLOCK=BLOCK,
        )
