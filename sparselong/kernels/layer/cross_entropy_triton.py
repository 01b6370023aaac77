"""The Triton kernel under `cross_entropy.py`: one row of logits, read twice, written once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softmax_kernel(
    logits_ptr, target_ptr, loss_ptr, vocab, NEEDS_GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The row's loss; softmax - e_target in place of its logits. Grid: rows.

    The running sum is kept for each lane and summed once: a step then needs one reduction, the
    maximum's. The target's logit is read before anything is written.
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
            # Not exp(logits - lse): rounding lse alone would cost a unit in the last place or two.
            probability = tl.exp(logits - highest) * scale
            gradient = probability - tl.where(column == target, 1.0, 0.0)
            tl.store(base + column, gradient.to(logits_ptr.dtype.element_ty), mask=real)
