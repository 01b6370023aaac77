"""Sort routed tokens by expert on the device, and move rows between tokens and sorted rows.

The sort is a stable counting sort in one kernel launch, without atomics or host synchronization:
an expert's program counts the entries of all experts, which gives its first row and its row tiles,
and then numbers its own entries. The host allocates for the upper bound. Reading all entries in
every program costs microseconds (64 KB for 4,096 tokens with four experts each), as launches do.

Windows of some experts' rows are the exception: how many there are depends on the routing. The host
reads it, but only after it has launched the first window's kernels, so the device is not idle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from sparselong.kernels.experts import triton_glue
from sparselong.kernels.launch import launch

BLOCK = 128
SORT_BLOCK, SORT_WARPS = 4096, 16
ASSERTING = {"debug": True, "sanitize_overflow": False}
"""Options with which Triton compiles a kernel's assertions, and no others."""


class Window(NamedTuple):
    """Some of the rows sorted by expert, of experts that are some of the layer's.

    Attributes:
        first_row: the first of the rows.
        rows: the most rows; there may be fewer, or none.
        first_expert: the layer's index of the first expert.
    """

    first_row: int
    rows: int
    first_expert: int


class Routing(NamedTuple):
    """Rows of the routed tokens after sorting by expert; tensors are int32 on the device.

    Attributes:
        positions: [tokens, top_k], row of each routed token among the rows sorted by expert; -1 if
            it is not in the window.
        starts: [experts + 1], first row of each expert.
        tile_starts: [experts + 1], first row tile of each expert.
        tile_expert: [most row tiles], expert of each row tile; entries past the last are undefined.
        window: which rows these are, numbered from 0; None: all routed tokens have one.
    """

    positions: torch.Tensor
    starts: torch.Tensor
    tile_starts: torch.Tensor
    tile_expert: torch.Tensor
    window: Window | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The four tensors in order."""
        return self.positions, self.starts, self.tile_starts, self.tile_expert

    @property
    def rows(self) -> int:
        """Number of rows to allocate."""
        return self.positions.numel() if self.window is None else self.window.rows

    @property
    def is_partial(self) -> bool:
        """Whether routed tokens may have no row."""
        return self.window is not None


def sort_by_expert(indices: torch.Tensor, experts: int, tile_rows: int) -> Routing:
    """Return the routing of [tokens, top_k] expert indices for tiles of `tile_rows` rows.

    An index outside [0, experts) fails a device-side assertion in the sort, as indices out of range
    do elsewhere in torch; a check on the host would cost a synchronization.
    """
    return _sort(indices.contiguous(), range(experts), experts, tile_rows, None)


class HeldRows:
    """The rows of the routed tokens of some of a layer's experts, sorted by expert, in windows.

    A backward pass can take the windows again: nothing is sorted twice, and the host knows their
    number by then. An index outside [-1, experts) fails a device-side assertion.

    Args:
        indices: [tokens, top_k], not empty.
        held: the experts whose tokens get rows.
        experts: number of experts in the layer.
        tile_rows: rows per tile.
        window_rows: most rows in a window.
    """

    def __init__(
        self, indices: torch.Tensor, held: range, experts: int, tile_rows: int, window_rows: int
    ):
        window = Window(0, min(window_rows, indices.numel()), held.start)
        self._whole = _sort(indices.contiguous(), held, experts, tile_rows, window)
        self._experts, self._tile_rows, self._window = len(held), tile_rows, window
        self._rows: int | None = None
        if indices.numel() <= window_rows:
            self._rows = indices.numel()  # at most; all fit one window
        else:
            self._read_rows = _start_reading(self._whole.starts[-1:])

    def windows(self) -> Iterator[Routing]:
        """Yield the routing of each window; at least one, and all others have rows.

        Asking the first time for the second one waits until the device has sorted.
        """
        size = self._window.rows
        if self._rows is not None and self._rows <= size:
            yield self._whole
            return
        yield self._make_window(0)
        if self._rows is None:
            self._rows = self._read_rows()
        for first in range(size, self._rows, size):
            yield self._make_window(first)

    def _make_window(self, first: int) -> Routing:
        whole, window = self._whole, self._window._replace(first_row=first)
        routing = _allocate(whole.positions, self._experts, self._tile_rows, window, window.rows)
        entries = whole.positions.numel()
        blocks = -(-entries // BLOCK)
        launch(triton_glue.window_kernel, (blocks + self._experts,),
            *(whole.positions, whole.starts, *routing.tensors, entries, self._experts, blocks),
            *window[:2],
            ROWS=self._tile_rows, BLOCK=BLOCK, EXPERTS=max(16, _power_of_two(self._experts)),
        )  # fmt: skip
        return routing


def _start_reading(number: torch.Tensor) -> Callable[[], int]:
    """Start copying a number [1] to the host; return a function that waits for it."""
    if number.device.type != "cuda":
        return number.item  # pyright: ignore[reportReturnType]
    copy = torch.empty(1, dtype=number.dtype, pin_memory=True)
    copy.copy_(number, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> int:
        copied.synchronize()
        return int(copy)

    return read


def _allocate(
    indices: torch.Tensor, experts: int, tile_rows: int, window: Window | None, rows: int
) -> Routing:
    """Return a routing without values, whose list of tiles is long enough for `rows`."""
    shapes = (
        indices.shape,
        (experts + 1,),
        (experts + 1,),
        (rows // tile_rows + min(experts, rows),),
    )
    make = lambda shape: torch.empty(shape, dtype=torch.int32, device=indices.device)  # noqa: E731
    return Routing(*map(make, shapes), window=window)


def _sort(
    indices: torch.Tensor, held: range, layer_experts: int, tile_rows: int, window: Window | None
) -> Routing:
    """Return the routing to the held experts; without a window all of the layer's are held.

    All routed tokens to held experts get rows, even if they are more than the window's.
    """
    entries, experts, others = indices.numel(), len(held), window is not None
    routing = _allocate(indices, experts, tile_rows, window, entries)
    launch(triton_glue.sort_kernel, (experts + others,),
        *(indices, *routing.tensors, entries, experts, held.start, layer_experts),
        ROWS=tile_rows, BLOCK=SORT_BLOCK, EXPERTS=max(16, _power_of_two(experts)), OTHERS=others,
        num_warps=SORT_WARPS, **ASSERTING,
    )  # fmt: skip
    return routing


def gather(
    x: torch.Tensor,
    routing: Routing,
    indices: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy x [tokens, width] to rows [routing.rows, width] sorted by expert.

    With a bias [experts, width], also return <x, bias of the expert> for each routed token with a
    row, fp32 [tokens, top_k]; without one, that tensor is uninitialized.
    """
    tokens, width = x.shape
    rows = torch.empty((routing.rows, width), dtype=x.dtype, device=x.device)
    inner = torch.empty(routing.positions.shape, dtype=torch.float32, device=x.device)
    launch(triton_glue.gather_kernel, (tokens,),
        *(x, routing.positions, rows, indices, rows if bias is None else bias, inner, width),
        0 if routing.window is None else routing.window.first_expert,
        TOP_K=routing.positions.shape[1], BLOCK=_power_of_two(width), INNER=bias is not None,
        PARTIAL=routing.is_partial,
    )  # fmt: skip
    return rows, inner


def combine(
    rows: torch.Tensor,
    routing: Routing,
    out: torch.Tensor,
    weights: torch.Tensor | None = None,
    exact: bool = False,
    residual: torch.Tensor | None = None,
) -> None:
    """Sum rows [routing.rows, width] by token, optionally with weights [tokens, top_k].

    Sums are in fp32, or if `exact` in fp64, in which their order does not matter. They go to `out`
    [tokens, width], contiguous. Those of a window that does not begin with the first row are added
    to it. A residual, contiguous and in out's shape and dtype, is added to the rounded sums of all
    routed tokens, without a window.
    """
    tokens, top_k = routing.positions.shape
    width = rows.shape[1]
    launch(triton_glue.combine_kernel, (tokens,),
        *(rows, routing.positions, rows if weights is None else weights),
        *(out if residual is None else residual, out, width),
        TOP_K=top_k, BLOCK=_power_of_two(width), WEIGHTED=weights is not None,
        PARTIAL=routing.is_partial, ADD=routing.window is not None and routing.window.first_row > 0,
        EXACT=exact, RESIDUAL=residual is not None,
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
    launch(triton_glue.sum_rows_kernel, (experts, -(-width // 128)),
        *(rows, sorted_weights, routing.starts, out, width),
        BLOCK=32, COLUMNS=128, WEIGHTED=weights is not None,
    )  # fmt: skip
    return out


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
