"""Launches the kernels of the experts' pass: tiles, buffers, chunks of experts, descriptors.

Forward: sort, gather, gate_up product with bias, gate, down product with bias, weighted sum.
Backward, with the routing weight w taken in as late as possible, so that its gradient comes from
what is at hand: rows of dout through down give dh / w; h is computed again from the saved gate_up,
dw = <dh / w, h> + <dout, bias>; d gate_up = w times the gate's derivative; through gate_up and
summed over the choices that is dx. Saved: gate_up's output and the routing, nothing else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from sparselong.kernels import gpu as architecture
from sparselong.kernels.experts import routing as expert_routing
from sparselong.kernels.experts import triton_products as expert_kernels
from sparselong.kernels.experts.routing import Routing
from sparselong.kernels.experts.tiles import Tile, tile_for

kernels: Any = expert_kernels  # triton's own types know no launch
glue = expert_routing.kernels
BUFFER_BYTES = 1 << 28
"""The most that decoded weights may take."""
DTYPES = (torch.bfloat16, torch.float32)
_DECODE_GROUPS, _DECODE_TURNS = 64, 8
GATE_BLOCK = 1024


class Projection(NamedTuple):
    """A stack of weights: blocks [E, out, in / 32, 16], scales [E, out, in / 32], bias [E, out]."""

    blocks: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor


def run_gate_up(
    x: torch.Tensor, indices: torch.Tensor, gate_up: Projection, backend: str
) -> tuple[torch.Tensor, Routing]:
    """(gate_up's output [entries, 2 * inner], routing): what the backward pass goes from.

    `backend` is one of "small", "packed" and "decode".
    """
    tile = choose_tile(x, backend, "forward")
    routing = expert_routing.sort_by_expert(indices, gate_up.blocks.shape[0], tile.rows)
    rows, _ = expert_routing.gather(x, routing, indices)
    return multiply(rows, gate_up, routing, backend, backward=False), routing


def run_forward(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: Projection,
    down: Projection,
    gate: tuple[float, float],
    backend: str,
    out: torch.Tensor,
) -> tuple[torch.Tensor, Routing]:
    """(gate_up's output, routing); the sum goes to out [tokens, hidden], contiguous.

    `gate` is alpha and limit.
    """
    wide, routing = run_gate_up(x, indices, gate_up, backend)
    h = apply_gate(wide, gate)
    rows = multiply(h, down, routing, backend, backward=False)
    del h
    expert_routing.combine(rows, routing, out, weights)
    return wide, routing


def run_inference(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: Projection,
    down: Projection,
    gate: tuple[float, float],
    backend: str,
    out: torch.Tensor,
) -> None:
    """`run_forward`'s out alone, to the bit; gate_up's output is gone before down's is made."""
    wide, routing = run_gate_up(x, indices, gate_up, backend)
    h = apply_gate(wide, gate)
    del wide
    rows = multiply(h, down, routing, backend, backward=False)
    del h
    expert_routing.combine(rows, routing, out, weights)


def run_backward(
    dout: torch.Tensor,
    wide: torch.Tensor,
    routing: Routing,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: Projection,
    down: Projection,
    gate: tuple[float, float],
    backend: str,
    dx: torch.Tensor | None,
    dweights: torch.Tensor | None,
    needs_biases: tuple[bool, bool] = (False, False),
    overwrite: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of x and the routing weights, to `dx` and `dweights` (contiguous; None: not asked
    for); returned are those of gate_up's and down's bias, where they are asked for.

    With `overwrite`, `wide` is written over by its gradient: 2 * inner values less for each entry.
    """
    needs_gate_up_bias, needs_down_bias = needs_biases
    dout = dout.contiguous()
    bias = None if dweights is None else down.bias
    rows, inner_products = expert_routing.gather(dout, routing, indices, bias)
    ddown_bias = None
    if needs_down_bias:
        ddown_bias = expert_routing.sum_by_expert(rows, routing, down.bias, weights)
    dh = multiply(rows, down, routing, backend, backward=True)
    del rows
    dwide = wide if overwrite else torch.empty_like(wide)
    glue.gate_backward_kernel[(wide.shape[0],)](
        *(wide, dh, routing.positions, weights, inner_products, dwide),
        *(weights if dweights is None else dweights, dh.shape[1], *gate),
        BLOCK=GATE_BLOCK, WEIGHT_GRADIENT=dweights is not None,
    )  # fmt: skip
    del dh
    dgate_up_bias = None
    if needs_gate_up_bias:
        dgate_up_bias = expert_routing.sum_by_expert(dwide, routing, gate_up.bias)
    if dx is not None:
        rows = multiply(dwide, gate_up, routing, backend, backward=True)
        del dwide
        expert_routing.combine(rows, routing, dx)
    return dgate_up_bias, ddown_bias


def apply_gate(wide: torch.Tensor, gate: tuple[float, float]) -> torch.Tensor:
    """gate_up's output [entries, 2 * inner] through the gate: [entries, inner]."""
    inner = wide.shape[1] // 2
    h = torch.empty((wide.shape[0], inner), dtype=wide.dtype, device=wide.device)
    glue.gate_kernel[(wide.shape[0],)](wide, h, inner, *gate, BLOCK=GATE_BLOCK)
    return h


def multiply(
    a: torch.Tensor, weight: Projection, routing: Routing, backend: str, backward: bool
) -> torch.Tensor:
    """Sorted rows a [entries, in] times each expert's weight, plus bias: [entries, out].

    Backward: a [entries, out] to [entries, in], without bias.
    """
    experts, wide, groups, _ = weight.blocks.shape
    columns, depth = (groups * 32, wide) if backward else (wide, groups * 32)
    out = torch.empty((a.shape[0], columns), dtype=a.dtype, device=a.device)
    tile = choose_tile(a, backend, "backward" if backward else "forward")
    tma = (
        architecture.tiles_of(a.device) == "sm_90" and a.dtype == torch.bfloat16 and tile.rows >= 64
    )
    tiles = routing.tile_expert.numel() * -(-columns // tile.columns)
    grid = (min(tiles, architecture.multiprocessors_of(a.device) * tile.programs),)
    a_tiles = TensorDescriptor.from_tensor(a, [tile.rows, tile.depth]) if tma else a
    lists = (routing.starts, routing.tile_expert, routing.tile_starts)
    constants = {
        "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "BACKWARD": backward,
        "BIAS": not backward, "TMA": tma,
        "PRECISION": "ieee" if a.dtype == torch.float32 else "tf32",
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    if backend != "decode":
        kernels.packed_kernel[grid](
            *(a_tiles, weight.blocks.view(torch.int32), weight.scales, weight.bias, out, *lists),
            *(experts, columns, depth),
            PTX=_has_ptx(a),
            **constants,
        )
        return out
    each = wide * groups * 32
    chunk = max(1, min(experts, BUFFER_BYTES // (each * a.element_size())))
    shape = (chunk, wide, groups * 32)
    buffer = torch.empty(shape, dtype=a.dtype, device=a.device)
    block = [1, tile.depth, tile.columns] if backward else [1, tile.columns, tile.depth]
    w_tiles = TensorDescriptor.from_tensor(buffer, block) if tma else buffer
    for first in range(0, experts, chunk):
        last = min(experts, first + chunk)
        decode_into(buffer, weight, first, last)
        kernels.dense_kernel[grid](
            *(a_tiles, w_tiles, weight.bias, out, *lists, first, last, columns, depth), **constants
        )
    return out


def decode_into(buffer: torch.Tensor, weight: Projection, first: int, last: int) -> None:
    """Values of experts [first, last) to the start of buffer [experts, out, in]."""
    words, scales = weight.blocks[first:last].view(torch.int32), weight.scales[first:last]
    grid = (-(-scales.numel() // (_DECODE_GROUPS * _DECODE_TURNS)),)
    kernels.decode_kernel[grid](
        *(words, scales, buffer, scales.numel()),
        GROUPS=_DECODE_GROUPS, TURNS=_DECODE_TURNS, PTX=_has_ptx(buffer), num_warps=8,
    )  # fmt: skip


def choose_tile(x: torch.Tensor, backend: str, direction: str) -> Tile:
    """The tile of a product of x's rows on x's device."""
    return tile_for(architecture.tiles_of(x.device), backend, direction, x.dtype == torch.float32)


def _has_ptx(values: torch.Tensor) -> bool:
    return values.dtype == torch.bfloat16 and values.device.type == "cuda"
