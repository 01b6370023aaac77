"""Sum of the partial results that several processes computed for the same rows."""

from __future__ import annotations

import torch


def sum_parts(parts: torch.Tensor, out: torch.Tensor) -> None:
    """Add the parts in order and round once.

    The sum is in fp32, or in fp64 if `parts` are.

    Args:
        parts: [parts, rows, width], contiguous, in out's dtype or a wider one.
        out: [rows, width], floating, contiguous, overwritten.

    Raises:
        ValueError: An argument does not fit; the message names it.
    """
    if parts.dim() != 3 or parts.shape[1:] != out.shape or not len(parts):
        raise ValueError(f"parts: {list(parts.shape)}; allowed: [parts, {list(out.shape)}]")
    fits = out.is_floating_point() and torch.promote_types(parts.dtype, out.dtype) == parts.dtype
    if not fits or parts.device != out.device:
        raise ValueError(
            f"parts: {parts.dtype} on {parts.device}; allowed: out's {out.dtype} or a wider dtype, "
            f"floating, on {out.device}"
        )
    if not parts.is_contiguous() or not out.is_contiguous():
        raise ValueError("parts, out: strided; allowed: contiguous")
    if out.device.type == "cuda":
        from sparselong.kernels.experts.triton_parts import add_parts

        add_parts(parts, out)
        return
    total = parts[0].to(torch.promote_types(parts.dtype, torch.float32), copy=True)
    for part in parts[1:]:
        total += part
    out.copy_(total)
