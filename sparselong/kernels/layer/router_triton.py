"""The Triton kernels of `router.py`."""

from __future__ import annotations

import triton
import triton.language as tl

LEAST, NAN_KEY = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)
"""Keys of an expert that cannot be chosen, and of a NaN."""


@triton.jit(do_not_specialize=["rows"])
def route_kernel(
    x_ptr, weight_ptr, bias_ptr, weights_ptr, indices_ptr, broken_ptr,
    stride_x, stride_w, rows, hidden, experts,
    TOP_K: tl.constexpr, WATCHED: tl.constexpr,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Choose the experts of some rows. Grid: row tiles."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, EXPERTS)
    at = row.to(tl.int64)
    real_row, real_expert = (row < rows)[:, None], (expert < experts)[None, :]
    x_at = x_ptr + at[:, None] * stride_x
    w_at = weight_ptr + expert[None, :] * stride_w
    logits = tl.zeros([ROWS, EXPERTS], tl.float32)
    for first in range(0, hidden, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < hidden
        x = tl.load(x_at + column[None, :], mask=real_row & inside[None, :], other=0.0)
        w = tl.load(w_at + column[:, None], mask=real_expert & inside[:, None], other=0.0)
        logits = tl.dot(x, w, logits, input_precision="ieee")
    kind = weights_ptr.dtype.element_ty
    logits += tl.load(bias_ptr + expert, mask=expert < experts, other=0.0).to(tl.float32)[None, :]
    logits = logits.to(kind).to(tl.float32)
    if WATCHED:
        infinite = (logits != logits) | (tl.abs(logits) == float("inf"))
        if tl.max(tl.max((infinite & real_row & real_expert).to(tl.int32), 1), 0) > 0:
            tl.store(broken_ptr, 1)
    keys = _order(logits)
    keys = tl.where(real_expert, keys, LEAST)
    choice = tl.arange(0, triton.next_power_of_2(TOP_K))
    values = tl.zeros([ROWS, triton.next_power_of_2(TOP_K)], tl.float32)
    chosen = tl.zeros([ROWS, triton.next_power_of_2(TOP_K)], tl.int32)
    for k in tl.static_range(TOP_K):
        largest = tl.max(keys, 1)
        index = tl.min(tl.where(keys == largest[:, None], expert[None, :], EXPERTS), 1)
        is_chosen = expert[None, :] == index[:, None]
        value = tl.sum(tl.where(is_chosen, logits, 0.0), 1)
        values = tl.where(choice[None, :] == k, value[:, None], values)
        chosen = tl.where(choice[None, :] == k, index[:, None], chosen)
        keys = tl.where(is_chosen, LEAST, keys)
    real_choice = (choice < TOP_K)[None, :]
    peak = tl.max(tl.where(real_choice, values, float("-inf")), 1)
    powers = tl.where(real_choice, tl.exp(values - peak[:, None]), 0.0)
    weights = tl.div_rn(powers, tl.broadcast_to(tl.sum(powers, 1)[:, None], powers.shape))
    to = at[:, None] * TOP_K + choice[None, :]
    tl.store(weights_ptr + to, weights.to(kind), mask=real_row & real_choice)
    tl.store(indices_ptr + to, chosen, mask=real_row & real_choice)


@triton.jit
def _order(x):
    """Return int32 keys that compare as the fp32 numbers x do, with NaN above all of them."""
    bits = x.to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys = tl.where(x == 0.0, 0, keys)  # -0 equals 0
    return tl.where(x != x, NAN_KEY, keys)


@triton.jit
def route_backward_kernel(
    others_ptr, dweights_ptr, weights_ptr, indices_ptr, weight_ptr, out_ptr,
    stride_others, stride_w, hidden,
    TOP_K: tl.constexpr, HAS_OTHERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a row of dx. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    mean = tl.zeros([], tl.float32)
    for k in tl.static_range(TOP_K):
        at = row * TOP_K + k
        mean += tl.load(weights_ptr + at).to(tl.float32) * tl.load(dweights_ptr + at).to(tl.float32)
    dx = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP_K):
        at = row * TOP_K + k
        dlogit = tl.load(dweights_ptr + at).to(tl.float32) - mean
        dlogit *= tl.load(weights_ptr + at).to(tl.float32)
        expert = tl.load(indices_ptr + at)
        w = tl.load(weight_ptr + expert * stride_w + column, mask=inside, other=0.0)
        dx += dlogit * w.to(tl.float32)
    if HAS_OTHERS:
        others = tl.load(others_ptr + row * stride_others + column, mask=inside, other=0.0)
        dx += others.to(tl.float32)
    tl.store(out_ptr + row * hidden + column, dx.to(out_ptr.dtype.element_ty), mask=inside)
