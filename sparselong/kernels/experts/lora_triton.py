"""Grouped low-rank products in Triton: each row times its own expert's A or B, and their gradients.

Rows are sorted by expert (`routing.py`). The kernels read an adapter's factors through strides, so
the same kernel serves A and B, forward and backward:

    shrink     narrow[row, j] = s · sum_k wide[row, k] F[e, j, k]
    expand     wide[row, k] += sum_j narrow[row, j] F[e, j, k]
    gradient   dF[e, j, k] += sum over the expert's rows of narrow[row, j] wide[row, k]

with s the adapter's scale and e the row's expert. F is A as stored, or B with its last two axes
swapped. `narrow` holds LoRA activations: fp32, r columns. `wide` holds full-width rows. Products
are taken in the dtype of `wide` and summed in fp32 in a fixed order, so results are bitwise
reproducible. There is no host synchronization and no weight-sized delta. Ours, under this
repository's licence; Punica (Chen et al., 2023, arXiv:2310.18547) uses the same grouped low-rank
product for many users' adapters.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparselong.kernels.experts.lora import Adapter
from sparselong.kernels.experts.routing import Routing
from sparselong.kernels.launch import launch

DEPTH, COLUMNS, BLOCK = 64, 64, 64


@triton.jit
def _locate(starts_ptr, tile_expert_ptr, tile_starts_ptr, ROWS: tl.constexpr):
    """Return this program's expert, the rows of its tile, and a mask of the expert's own rows."""
    tile = tl.program_id(0)
    expert = tl.load(tile_expert_ptr + tile)
    first = tl.load(starts_ptr + expert) + (tile - tl.load(tile_starts_ptr + expert)) * ROWS
    row = first + tl.arange(0, ROWS)
    return expert.to(tl.int64), row.to(tl.int64), row < tl.load(starts_ptr + expert + 1)


@triton.jit
def shrink_kernel(
    wide_ptr, factor_ptr, narrow_ptr, starts_ptr, tile_expert_ptr, tile_starts_ptr,
    experts, width, rank, scaling, by_expert, by_rank, by_column,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module docstring. Grid: an upper bound on the number of row tiles."""
    if tl.program_id(0) < tl.load(tile_starts_ptr + experts):
        expert, row, real = _locate(starts_ptr, tile_expert_ptr, tile_starts_ptr, ROWS)  # pyright: ignore[reportGeneralTypeIssues]
        inner = tl.arange(0, RANK)
        pointers = factor_ptr + expert * by_expert + inner[None, :] * by_rank
        total = tl.zeros([ROWS, RANK], tl.float32)
        for first in range(0, width, DEPTH):
            at = first + tl.arange(0, DEPTH)
            inside = at < width
            wide = tl.load(
                wide_ptr + row[:, None] * width + at[None, :],
                mask=real[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
            factor = tl.load(
                pointers + at[:, None] * by_column,
                mask=inside[:, None] & (inner < rank)[None, :], other=0.0,
            )  # fmt: skip
            total = tl.dot(wide, factor, total, input_precision=PRECISION)
        out = narrow_ptr + row[:, None] * rank + inner[None, :]
        tl.store(out, total * scaling, mask=real[:, None] & (inner < rank)[None, :])


@triton.jit
def expand_kernel(
    narrow_ptr, factor_ptr, wide_ptr, starts_ptr, tile_expert_ptr, tile_starts_ptr,
    experts, width, rank, by_expert, by_rank, by_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module docstring. Grid: (row tiles, column tiles)."""
    if tl.program_id(0) < tl.load(tile_starts_ptr + experts):
        expert, row, real = _locate(starts_ptr, tile_expert_ptr, tile_starts_ptr, ROWS)  # pyright: ignore[reportGeneralTypeIssues]
        inner = tl.arange(0, RANK)
        at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = at < width
        narrow = tl.load(
            narrow_ptr + row[:, None] * rank + inner[None, :],
            mask=real[:, None] & (inner < rank)[None, :], other=0.0,
        )  # fmt: skip
        factor = tl.load(
            factor_ptr + expert * by_expert + inner[:, None] * by_rank + at[None, :] * by_column,
            mask=(inner < rank)[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        added = tl.dot(narrow.to(factor.dtype), factor, input_precision=PRECISION)
        pointers = wide_ptr + row[:, None] * width + at[None, :]
        mask = real[:, None] & inside[None, :]
        wide = tl.load(pointers, mask=mask, other=0.0).to(tl.float32) + added
        tl.store(pointers, wide.to(wide_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gradient_kernel(
    narrow_ptr, wide_ptr, grad_ptr, starts_ptr, width, rank, by_expert, by_rank, by_column,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module docstring. Grid: (experts, column tiles)."""
    expert = tl.program_id(0)
    inner = tl.arange(0, RANK)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < width
    begin, end = tl.load(starts_ptr + expert), tl.load(starts_ptr + expert + 1)
    total = tl.zeros([COLUMNS, RANK], tl.float32)
    for first in range(begin, end, BLOCK):
        row = (first + tl.arange(0, BLOCK)).to(tl.int64)
        real = row < end
        wide = tl.load(
            wide_ptr + row[:, None] * width + at[None, :],
            mask=real[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        narrow = tl.load(
            narrow_ptr + row[:, None] * rank + inner[None, :],
            mask=real[:, None] & (inner < rank)[None, :], other=0.0,
        )  # fmt: skip
        total = tl.dot(tl.trans(wide), narrow.to(wide.dtype), total, input_precision=PRECISION)
    pointers = grad_ptr + expert.to(tl.int64) * by_expert + inner[None, :] * by_rank
    pointers += at.to(tl.int64)[:, None] * by_column
    mask = inside[:, None] & (inner < rank)[None, :]
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + total, mask=mask)


def add_adapter_(
    out: torch.Tensor, rows: torch.Tensor, adapter: Adapter, routing: Routing, tile_rows: int
) -> None:
    """Add s (x A^T) B^T by expert to a product's output, in place.

    Args:
        out: [entries, out], rows sorted by expert.
        rows: x, [entries, in].
        adapter: factors in x's dtype.
        routing: routing of the rows.
        tile_rows: rows per tile that `routing` was made for.
    """
    narrow = shrink(rows, adapter.a, adapter.scaling, routing, tile_rows)
    expand_(out, narrow, adapter.b.mT, routing, tile_rows)


def add_gradients_(
    sums: Adapter,
    adapter: Adapter,
    rows: torch.Tensor,
    drows: torch.Tensor,
    routing: Routing,
    tile_rows: int,
    row_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add the gradients of A and B to `sums`, and return g = s dy B, fp32 [entries, r].

    The caller adds the adapter's share of dx, g A, with `expand_`.

    Args:
        sums: fp32, of the factors' shapes.
        adapter: factors in the rows' dtype.
        rows: x, [entries, in], rows sorted by expert.
        drows: dy, [entries, out].
        routing: routing of the rows.
        tile_rows: rows per tile that `routing` was made for.
        row_weights: fp32 [entries, 1], factors of dy that are not yet applied to it.
    """

    def weigh(narrow: torch.Tensor) -> torch.Tensor:
        return narrow if row_weights is None else narrow * row_weights

    narrow = shrink(rows, adapter.a, adapter.scaling, routing, tile_rows)
    add_gradient_(sums.b.mT, weigh(narrow), drows, routing)
    narrow = shrink(drows, adapter.b.mT, adapter.scaling, routing, tile_rows)
    add_gradient_(sums.a, weigh(narrow), rows, routing)
    return narrow


def shrink(
    wide: torch.Tensor, factor: torch.Tensor, scaling: float, routing: Routing, tile_rows: int
) -> torch.Tensor:
    """Return s · wide Fᵀ by expert, fp32 [entries, r].

    Args:
        wide: rows sorted by expert, [entries, width], contiguous.
        factor: F, [experts, r, width], in wide's dtype, any strides.
        scaling: s.
        routing: routing of the rows.
        tile_rows: rows per tile that `routing` was made for.
    """
    rank = factor.shape[1]
    narrow = torch.empty((wide.shape[0], rank), dtype=torch.float32, device=wide.device)
    launch(shrink_kernel, (routing.tile_expert.numel(),),
        *(wide, factor, narrow, *_lists(routing), factor.shape[0], wide.shape[1], rank, scaling),
        *factor.stride(),
        ROWS=tile_rows, DEPTH=DEPTH, RANK=_padded(rank), PRECISION=_precision(wide),
    )  # fmt: skip
    return narrow


def expand_(
    wide: torch.Tensor, narrow: torch.Tensor, factor: torch.Tensor, routing: Routing, tile_rows: int
) -> None:
    """Add narrow F by expert to wide, in place; arguments as in `shrink`."""
    width, rank = wide.shape[1], narrow.shape[1]
    launch(expand_kernel, (routing.tile_expert.numel(), -(-width // COLUMNS)),
        *(narrow, factor, wide, *_lists(routing), factor.shape[0], width, rank),
        *factor.stride(),
        ROWS=tile_rows, COLUMNS=COLUMNS, RANK=_padded(rank), PRECISION=_precision(wide),
    )  # fmt: skip


def add_gradient_(
    grad: torch.Tensor, narrow: torch.Tensor, wide: torch.Tensor, routing: Routing
) -> None:
    """Add each expert's narrowᵀ wide to grad, fp32 [experts, r, width], any strides."""
    experts, rank, width = grad.shape
    launch(gradient_kernel, (experts, -(-width // COLUMNS)),
        *(narrow, wide, grad, routing.starts, width, rank),
        *grad.stride(),
        BLOCK=BLOCK, COLUMNS=COLUMNS, RANK=_padded(rank), PRECISION=_precision(wide),
    )  # fmt: skip


def _lists(routing: Routing) -> tuple[torch.Tensor, ...]:
    return routing.starts, routing.tile_expert, routing.tile_starts


def _padded(rank: int) -> int:
    """Return `rank` padded to the next size that tensor cores support."""
    return max(16, 1 << (rank - 1).bit_length())


def _precision(wide: torch.Tensor) -> str:
    return "ieee" if wide.dtype == torch.float32 else "tf32"
