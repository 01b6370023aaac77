"""The Triton kernel of `cross_entropy.py`: reads a row of logits twice and writes it once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softmax_kernel(
    logits_ptr, target_ptr, loss_ptr, vocab, NEEDS_GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write a row's loss and, for gradients, softmax - e_target over its logits. Grid: rows.

    Each lane keeps its own running sum until the end, so that a step needs one reduction, for the
    maximum. The target's logit is read before anything is written.
    """
    row = tl.program_id(0)
    base = logits_ptr + row.to(tl.int64) * vocab
    target = tl.load(target_ptr + row)
    chosen = tl.load(base + target).to(tl.float32)
    lane = tl.arange(0, BLOCK)
    highest = float("-inf")
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        column = start + lane
        logits = tl.load(base + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(logits, 0))
        total = total * tl.exp(highest - higher) + tl.exp(logits - higher)
        highest = higher
    normalizer = tl.sum(total, 0)
    tl.store(loss_ptr + row, highest - chosen + tl.log(normalizer))
    if NEEDS_GRADIENT:
        scale = tl.div_rn(1.0, normalizer)
        for start in range(0, vocab, BLOCK):
            column = start + lane
            real = column < vocab
            logits = tl.load(base + column, mask=real, other=float("-inf")).to(tl.float32)
            # Not exp(logits - lse): rounding lse alone would cost one or two ulps.
            probability = tl.exp(logits - highest) * scale
            gradient = probability - tl.where(column == target, 1.0, 0.0)
            tl.store(base + column, gradient.to(logits_ptr.dtype.element_ty), mask=real)
