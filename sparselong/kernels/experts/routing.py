"""Sort routed tokens by expert on the device, and move rows between tokens and sorted rows.

The sort is a stable counting sort in three kernel launches, without atomics or host
synchronization: counts per block, their prefix sums per expert, then each entry's row. The same
counts give each expert's first row and its row tiles; the host allocates for the upper bound.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from sparselong.kernels.experts import triton_glue

kernels: Any = triton_glue  # triton's types do not cover launches
BLOCK = 128


class Routing(NamedTuple):
    """Rows of the routed tokens after sorting by expert; all int32 on the device.

    Attributes:
        positions: [tokens, top_k], row of each routed token among the rows sorted by expert.
        starts: [experts + 1], first row of each expert.
        tile_starts: [experts + 1], first row tile of each expert.
        tile_expert: [most row tiles], expert of each row tile; entries past the last are undefined.
    """

    positions: torch.Tensor
    starts: torch.Tensor
    tile_starts: torch.Tensor
    tile_expert: torch.Tensor


def sort_by_expert(indices: torch.Tensor, experts: int, tile_rows: int) -> Routing:
    """Return the routing of [tokens, top_k] expert indices for tiles of `tile_rows` rows.

    An index outside [0, experts) fails a device-side assertion (`torch._assert_async`), as indices
    out of range do elsewhere in torch; a check on the host would cost a synchronization.
    """
    indices = indices.contiguous()
    entries, device = indices.numel(), indices.device
    blocks = -(-entries // BLOCK)
    padded = max(16, _power_of_two(experts))
    empty = lambda *shape: torch.empty(shape, dtype=torch.int32, device=device)  # noqa: E731
    ranks, counts, totals, valid = empty(entries), empty(experts, blocks), empty(experts), empty(1)
    routing = Routing(
        empty(*indices.shape),
        empty(experts + 1),
        empty(experts + 1),
        empty(entries // tile_rows + min(experts, entries)),
    )
    kernels.count_kernel[(blocks,)](
        indices, ranks, counts, entries, experts, BLOCK=BLOCK, EXPERTS=padded
    )
    kernels.scan_kernel[(experts,)](counts, totals, blocks, BLOCK=1024)
    kernels.place_kernel[(blocks + experts,)](
        *(indices, ranks, counts, totals, *routing, valid, entries, experts, blocks),
        ROWS=tile_rows, BLOCK=BLOCK, EXPERTS=padded,
    )  # fmt: skip
    message = "expert_indices: an index is outside [0, experts)"
    torch._assert_async(valid, message)  # pyright: ignore[reportPrivateImportUsage]
    return routing


def gather(
    x: torch.Tensor,
    routing: Routing,
    indices: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy x [tokens, width] to rows [tokens * top_k, width] sorted by expert.

    With a bias [experts, width], also return <x, bias of the expert> for each routed token, fp32
    [tokens, top_k]; without one, that tensor is uninitialized.
    """
    tokens, width = x.shape
    rows = torch.empty((routing.positions.numel(), width), dtype=x.dtype, device=x.device)
    inner = torch.empty(routing.positions.shape, dtype=torch.float32, device=x.device)
    kernels.gather_kernel[(tokens,)](
        *(x, routing.positions, rows, indices, rows if bias is None else bias, inner, width),
        TOP_K=routing.positions.shape[1], BLOCK=_power_of_two(width), INNER=bias is not None,
    )  # fmt: skip
    return rows, inner


def combine(
    rows: torch.Tensor, routing: Routing, out: torch.Tensor, weights: torch.Tensor | None = None
) -> None:
    """Sum rows [tokens * top_k, width] by token, optionally with weights [tokens, top_k].

    The sums go to `out` [tokens, width], contiguous.
    """
    tokens, top_k = routing.positions.shape
    width = rows.shape[1]
    kernels.combine_kernel[(tokens,)](
        *(rows, routing.positions, rows if weights is None else weights, out, width),
        TOP_K=top_k, BLOCK=_power_of_two(width), WEIGHTED=weights is not None,
    )  # fmt: skip


def sum_by_expert(
    rows: torch.Tensor, routing: Routing, like: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return a bias's gradient: rows summed by expert, [experts, width].

    Args:
        rows: [entries, width], sorted by expert.
        routing: routing of the rows.
        like: [experts, width], gives the result's dtype.
        weights: [tokens, top_k], factors of the rows.
    """
    experts, width = like.shape
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    sorted_weights = rows
    if weights is not None:
        sorted_weights = torch.empty_like(weights.flatten())
        sorted_weights[routing.positions.flatten().long()] = weights.flatten()
    kernels.sum_rows_kernel[(experts, -(-width // 128))](
        *(rows, sorted_weights, routing.starts, out, width),
        BLOCK=32, COLUMNS=128, WEIGHTED=weights is not None,
    )  # fmt: skip
    return out


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
