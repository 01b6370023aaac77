"""Launches the kernels of the experts' pass: tiles, buffers, chunks of experts, descriptors.

Forward: sort, gather, gate_up product with bias, gate, down product with bias, weighted sum.
Adapters, where there are any, are added to the products (`lora_triton.py`).
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
from sparselong.kernels.expert_stack import Gate, PackedWeight
from sparselong.kernels.experts import routing as expert_routing
from sparselong.kernels.experts import triton_products as expert_kernels
from sparselong.kernels.experts.call import ExpertCall, ExpertOperands
from sparselong.kernels.experts.lora import NO_ADAPTERS, Adapters
from sparselong.kernels.experts.lora_triton import add_adapter_, add_gradients_, expand_
from sparselong.kernels.experts.routing import Routing
from sparselong.kernels.experts.tiles import Tile, tile_for

kernels: Any = expert_kernels  # triton's own types know no launch
glue = expert_routing.kernels
BUFFER_BYTES = 1 << 28
"""The most that decoded weights may take."""
DTYPES = (torch.bfloat16, torch.float32)
_DECODE_GROUPS, _DECODE_TURNS = 64, 8
GATE_BLOCK = 1024


class SavedForward(NamedTuple):
    """What the backward pass of some tokens goes from.

    Attributes:
        wide: gate_up's output, [entries, 2 * inner], rows sorted by expert.
        routing: where the rows are.
        indices, weights: as in the call.
        x: [tokens, hidden]; only an adapter of gate_up needs it.
    """

    wide: torch.Tensor
    routing: Routing
    indices: torch.Tensor
    weights: torch.Tensor
    x: torch.Tensor | None


class Gradients(NamedTuple):
    """Which gradients a backward pass makes, and where it leaves them.

    Attributes:
        x: [tokens, hidden], contiguous, written; None: not asked for.
        weights: [tokens, top_k], likewise.
        biases: whether those of gate_up and down are asked for.
        adapters: fp32 sums of the factors' shapes, added to.
    """

    x: torch.Tensor | None
    weights: torch.Tensor | None
    biases: tuple[bool, bool] = (False, False)
    adapters: Adapters = NO_ADAPTERS

    def part(self, tokens: slice) -> Gradients:
        """The places of some of the tokens; views."""
        x, weights = (None if tensor is None else tensor[tokens] for tensor in self[:2])
        return self._replace(x=x, weights=weights)


def run_gate_up(
    x: torch.Tensor, indices: torch.Tensor, operands: ExpertOperands
) -> tuple[torch.Tensor, Routing]:
    """Output of gate_up with its adapter, [entries, 2 * inner], and the routing.

    The backend is one of "small", "packed" and "decode", here and in all that follows.
    """
    stack, adapters, _, backend = operands
    tile_rows = choose_tile(x, backend, "forward").rows
    routing = expert_routing.sort_by_expert(indices, stack.experts, tile_rows)
    rows, _ = expert_routing.gather(x, routing, indices)
    wide = multiply(rows, stack.gate_up, routing, backend, backward=False)
    if adapters.gate_up is not None:
        add_adapter_(wide, rows, adapters.gate_up, routing, tile_rows)
    return wide, routing


def run_forward(
    call: ExpertCall, operands: ExpertOperands, out: torch.Tensor, keep: bool
) -> tuple[torch.Tensor, Routing] | None:
    """Write the weighted sums to `out`.

    Args:
        call: contiguous tokens.
        operands: adapters in x's dtype.
        out: [tokens, hidden], contiguous.
        keep: whether gate_up's output is wanted; otherwise it is gone before down's is made.

    Returns:
        What `run_gate_up` returned, or None.
    """
    x, indices, weights = call
    stack, adapters, gate, backend = operands
    wide, routing = run_gate_up(x, indices, operands)
    h = apply_gate(wide, gate)
    made = (wide, routing) if keep else None
    del wide
    rows = multiply(h, stack.down, routing, backend, backward=False)
    if adapters.down is not None:
        tile_rows = choose_tile(x, backend, "forward").rows
        add_adapter_(rows, h, adapters.down, routing, tile_rows)
    del h
    expert_routing.combine(rows, routing, out, weights)
    return made


def run_backward(
    dout: torch.Tensor,
    saved: SavedForward,
    operands: ExpertOperands,
    gradients: Gradients,
    overwrite: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Fill `gradients`, and return those of gate_up's and down's bias where they are asked for.

    Args:
        dout: [tokens, hidden].
        saved: of the same tokens.
        operands: as in the forward pass.
        gradients: see there.
        overwrite: whether gate_up's output is written over by its gradient: 2 * inner values less
            for each entry.
    """
    wide, routing, indices, weights, _ = saved
    stack, adapters, gate, backend = operands
    bias = None if gradients.weights is None else stack.down.bias
    rows, inner_products = expert_routing.gather(dout.contiguous(), routing, indices, bias)
    ddown_bias = None
    if gradients.biases[1]:
        ddown_bias = expert_routing.sum_by_expert(rows, routing, stack.down.bias, weights)
    dh = multiply(rows, stack.down, routing, backend, backward=True)
    if adapters.down is not None:
        _differentiate_down_adapter(rows, dh, saved, operands, gradients)
    del rows
    dwide = wide if overwrite else torch.empty_like(wide)
    glue.gate_backward_kernel[(wide.shape[0],)](
        *(wide, dh, routing.positions, weights, inner_products, dwide),
        *(weights if gradients.weights is None else gradients.weights, dh.shape[1], *gate),
        BLOCK=GATE_BLOCK, WEIGHT_GRADIENT=gradients.weights is not None,
    )  # fmt: skip
    del dh
    dgate_up_bias = None
    if gradients.biases[0]:
        dgate_up_bias = expert_routing.sum_by_expert(dwide, routing, stack.gate_up.bias)
    narrow = None
    if adapters.gate_up is not None:
        narrow = _differentiate_gate_up_adapter(dwide, saved, operands, gradients)
    if gradients.x is not None:
        rows = multiply(dwide, stack.gate_up, routing, backend, backward=True)
        del dwide
        if adapters.gate_up is not None and narrow is not None:
            tile_rows = choose_tile(rows, backend, "forward").rows
            expand_(rows, narrow, adapters.gate_up.a, routing, tile_rows)
        expert_routing.combine(rows, routing, gradients.x)
    return dgate_up_bias, ddown_bias


def _differentiate_down_adapter(
    rows: torch.Tensor,
    dh: torch.Tensor,
    saved: SavedForward,
    operands: ExpertOperands,
    gradients: Gradients,
) -> None:
    """Add the adapter's share to dh, and its factors' gradients to their sums.

    Args:
        rows: of dout, [entries, hidden], without the routing weights, as dh is.
    """
    adapter, sums = operands.adapters.down, gradients.adapters.down
    assert adapter is not None and sums is not None
    routing, weights = saved.routing, saved.weights
    tile_rows = choose_tile(rows, operands.backend, "forward").rows
    h = apply_gate(saved.wide, operands.gate)
    row_weights = torch.empty(weights.numel(), dtype=torch.float32, device=weights.device)
    row_weights[routing.positions.flatten().long()] = weights.flatten().float()
    narrow = add_gradients_(sums, adapter, h, rows, routing, tile_rows, row_weights[:, None])
    expand_(dh, narrow, adapter.a, routing, tile_rows)


def _differentiate_gate_up_adapter(
    dwide: torch.Tensor, saved: SavedForward, operands: ExpertOperands, gradients: Gradients
) -> torch.Tensor:
    """Add the factors' gradients to their sums, and return g as `add_gradients_` does."""
    adapter, sums, x = operands.adapters.gate_up, gradients.adapters.gate_up, saved.x
    assert adapter is not None and sums is not None and x is not None
    rows, _ = expert_routing.gather(x, saved.routing, saved.indices)
    tile_rows = choose_tile(rows, operands.backend, "forward").rows
    return add_gradients_(sums, adapter, rows, dwide, saved.routing, tile_rows)


def apply_gate(wide: torch.Tensor, gate: Gate) -> torch.Tensor:
    """gate_up's output [entries, 2 * inner] through the gate: [entries, inner]."""
    inner = wide.shape[1] // 2
    h = torch.empty((wide.shape[0], inner), dtype=wide.dtype, device=wide.device)
    glue.gate_kernel[(wide.shape[0],)](wide, h, inner, *gate, BLOCK=GATE_BLOCK)
    return h


def multiply(
    a: torch.Tensor, weight: PackedWeight, routing: Routing, backend: str, backward: bool
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


def decode_into(buffer: torch.Tensor, weight: PackedWeight, first: int, last: int) -> None:
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
