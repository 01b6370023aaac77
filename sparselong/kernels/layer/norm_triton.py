"""The Triton kernels of `norm.py`: one row at a time, with statistics in fp32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def forward_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, inverse_ptr,
    stride_x, stride_residual, hidden, eps,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write one row's out, 1 / rms and, with a residual, the rounded sum. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    real = column < hidden
    h = tl.load(x_ptr + row * stride_x + column, mask=real, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        added = tl.load(residual_ptr + row * stride_residual + column, mask=real, other=0.0)
        total = (h + added.to(tl.float32)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * hidden + column, total, mask=real)
        h = total.to(tl.float32)
    mean = tl.div_rn(tl.sum(h * h, 0), hidden.to(tl.float32))
    inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    tl.store(inverse_ptr + row, inverse)
    weight = tl.load(weight_ptr + column, mask=real, other=0.0).to(tl.float32)
    out = weight * (h * inverse)
    tl.store(out_ptr + row * hidden + column, out.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["rows", "rows_each"])
def backward_kernel(
    dout_ptr, dtotal_ptr, h_ptr, weight_ptr, inverse_ptr, dx_ptr, dweight_ptr,
    stride_dout, stride_dtotal, stride_h, rows, rows_each, hidden,
    HAS_TOTAL: tl.constexpr, WEIGHT_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write dx of `rows_each` adjacent rows and their fp32 share of dweight [programs, hidden]."""
    column = tl.arange(0, BLOCK)
    real = column < hidden
    weight = tl.load(weight_ptr + column, mask=real, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0) * rows_each
    for index in range(first, tl.minimum(first + rows_each, rows)):
        row = tl.zeros([], tl.int64) + index
        h = tl.load(h_ptr + row * stride_h + column, mask=real, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + row * stride_dout + column, mask=real, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_ptr + row)
        normed = h * inverse
        scaled = dout * weight
        dx = inverse * (scaled - normed * (tl.sum(scaled * normed, 0) / hidden))
        if HAS_TOTAL:
            passed = tl.load(dtotal_ptr + row * stride_dtotal + column, mask=real, other=0.0)
            dx += passed.to(tl.float32)
        tl.store(dx_ptr + row * hidden + column, dx.to(dx_ptr.dtype.element_ty), mask=real)
        if WEIGHT_GRADIENT:
            dweight += dout * normed
    if WEIGHT_GRADIENT:
        at = tl.program_id(0).to(tl.int64) * hidden
        tl.store(dweight_ptr + at + column, dweight, mask=real)
