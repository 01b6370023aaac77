"""The Triton kernels of `cross_entropy_shard.py`.

One reads a row of a shard's logits, the other overwrites it once the other shards' statistics are
known.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def statistics_kernel(
    logits_ptr, target_ptr, statistics_ptr, columns, first, BLOCK: tl.constexpr
):  # fmt: skip
    """Write a row's maximum, sum of exp(logit - maximum), and target's logit. Grid: rows.

    Each lane keeps its own running sum until the end, as in `softmax_kernel`.
    """
    row = tl.program_id(0)
    base = logits_ptr + row.to(tl.int64) * columns
    target = tl.load(target_ptr + row) - first
    is_held = (target >= 0) & (target < columns)
    chosen = tl.load(base + target, mask=is_held, other=float("-inf")).to(tl.float32)
    lane = tl.arange(0, BLOCK)
    highest = float("-inf")
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + lane
        logits = tl.load(base + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(logits, 0))
        total = total * tl.exp(highest - higher) + tl.exp(logits - higher)
        highest = higher
    tl.store(statistics_ptr + row * 3, highest)
    tl.store(statistics_ptr + row * 3 + 1, tl.sum(total, 0))
    tl.store(statistics_ptr + row * 3 + 2, chosen)


@triton.jit
def gradient_kernel(
    logits_ptr, target_ptr, normalizer_ptr, columns, first, BLOCK: tl.constexpr
):  # fmt: skip
    """Write softmax - e_target over a block of a row's logits. Grid: (rows, blocks)."""
    row = tl.program_id(0)
    base = logits_ptr + row.to(tl.int64) * columns
    target = tl.load(target_ptr + row) - first
    highest = tl.load(normalizer_ptr + row * 2)
    scale = tl.div_rn(1.0, tl.load(normalizer_ptr + row * 2 + 1))
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < columns
    logits = tl.load(base + column, mask=real, other=float("-inf")).to(tl.float32)
    gradient = tl.exp(logits - highest) * scale - tl.where(column == target, 1.0, 0.0)
    tl.store(base + column, gradient.to(logits_ptr.dtype.element_ty), mask=real)
