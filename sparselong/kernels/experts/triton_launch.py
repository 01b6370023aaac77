"""Launch the kernels of the expert pass: tiles, buffers, chunks of experts, descriptors.

Forward: sort, gather, gate_up product with bias, gate, down product with bias, weighted sum.
Adapters, if any, are added to the products (`lora_triton.py`).
Backward applies the routing weight w as late as possible, so that dw needs no extra product: rows
of dout through down give dh / w; h is recomputed from gate_up's output and
dw = <dh / w, h> + <dout, bias>; d gate_up is w times the gate's derivative; through gate_up and
summed over each token's experts it gives dx. `SavedForward` lists what backward needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from sparselong.kernels import gpu
from sparselong.kernels.expert_stack import Gate, PackedWeight
from sparselong.kernels.experts import triton_glue, triton_products
from sparselong.kernels.experts.call import ExpertCall, ExpertOperands, Gradients
from sparselong.kernels.experts.lora_triton import add_adapter_, add_gradients_, expand_
from sparselong.kernels.experts.routing import (
    HeldRows,
    Routing,
    combine,
    gather,
    sort_by_expert,
    sum_by_expert,
)
from sparselong.kernels.experts.tiles import Tile, tile_for
from sparselong.kernels.launch import launch

BUFFER_BYTES = 1 << 28
"""Most bytes of decoded weights held at once."""
_DECODE_GROUPS, _DECODE_TURNS = 64, 8
SPREAD = 8
"""Programs of a product for each that runs at once, if this process holds some of the experts.

Exchanges then run beside the products, and their kernels occupy multiprocessors: programs that find
no place run after all others. Beside a kernel like NCCL's on 8 of 132 multiprocessors, the four
products of a pass with 512 rows per expert took 4.7 ms on an H200, 7.0 without; alone 4.6 and 4.5.
"""
GATE_BLOCK = 1024


class SavedForward(NamedTuple):
    """Inputs of the backward pass for some of the tokens.

    Attributes:
        recall: returns gate_up's output, [entries, 2 * inner], rows sorted by expert, and x,
            [tokens, hidden], which only an adapter of gate_up needs. It is called once, after the
            work that needs neither.
        routing: routing of the rows.
        indices: as in the call.
        weights: as in the call.
        decoded: gate_up's weights from `decode_all`; None: its product decodes them.
    """

    recall: Callable[[], tuple[torch.Tensor, torch.Tensor | None]]
    routing: Routing
    indices: torch.Tensor
    weights: torch.Tensor
    decoded: torch.Tensor | None = None


def sort_held(
    call: ExpertCall, operands: ExpertOperands, held: range, experts: int, window_rows: int
) -> HeldRows:
    """Return the rows of held experts, sorted for the products' tiles."""
    tile_rows = choose_tile(call.x, operands.backend, "forward").rows
    return HeldRows(call.indices, held, experts, tile_rows, window_rows)


def sort_all(call: ExpertCall, operands: ExpertOperands) -> Routing:
    """Return the routing of all of a call's tokens, sorted for the products' tiles."""
    tile_rows = choose_tile(call.x, operands.backend, "forward").rows
    return sort_by_expert(call.indices, operands.stack.experts, tile_rows)


def run_gate_up(
    x: torch.Tensor,
    indices: torch.Tensor,
    operands: ExpertOperands,
    routing: Routing,
    decoded: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return gate_up's output with its adapter, [routing.rows, 2 * inner].

    `decoded` is as in `SavedForward`. The backend is "small", "packed" or "decode" throughout this
    module.
    """
    stack, adapters, _, backend = operands
    rows, _ = gather(x, routing, indices)
    gate_up = multiply(rows, stack.gate_up, routing, backend, backward=False, decoded=decoded)
    if adapters.gate_up is not None:
        tile_rows = choose_tile(x, backend, "forward").rows
        add_adapter_(gate_up, rows, adapters.gate_up, routing, tile_rows)
    return gate_up


def run_forward(
    call: ExpertCall,
    operands: ExpertOperands,
    out: torch.Tensor,
    keep: bool,
    routing: Routing | None = None,
    exact: bool = False,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, Routing]:
    """Write the weighted sums, and the residual added to them, to `out`.

    Args:
        call: tokens and routing, contiguous.
        operands: its adapters are in x's dtype.
        out: [tokens, hidden], contiguous.
        keep: whether to return gate_up's output; if not, it is freed before down's is allocated.
        routing: of a window; None: all routed tokens.
        exact: whether to round the sums once, from fp64.
        residual: as in `combine`.

    Returns:
        gate_up's output or None, and the routing.
    """
    x, indices, weights = call
    stack, adapters, gate, backend = operands
    routing = routing or sort_all(call, operands)
    gate_up = run_gate_up(x, indices, operands, routing)
    h = apply_gate(gate_up, routing, gate)
    kept = gate_up if keep else None
    del gate_up
    rows = multiply(h, stack.down, routing, backend, backward=False)
    if adapters.down is not None:
        tile_rows = choose_tile(x, backend, "forward").rows
        add_adapter_(rows, h, adapters.down, routing, tile_rows)
    del h
    combine(rows, routing, out, weights, exact, residual)
    return kept, routing


def run_backward(
    dout: torch.Tensor,
    saved: SavedForward,
    operands: ExpertOperands,
    gradients: Gradients,
    overwrite: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Fill `gradients`, and return the gradients of gate_up's and down's bias where needed.

    Args:
        dout: [tokens, hidden].
        saved: of the same tokens.
        operands: as in the forward pass.
        gradients: tensors to fill.
        overwrite: whether gate_up's gradient overwrites its output, which saves 2 * inner values
            per routed token.
    """
    recall, routing, indices, weights, decoded = saved
    stack, adapters, gate, backend = operands
    bias = None if gradients.weights is None else stack.down.bias
    rows, inner_products = gather(dout.contiguous(), routing, indices, bias)
    ddown_bias = None
    if gradients.biases[1]:
        ddown_bias = sum_by_expert(rows, routing, stack.down.bias, weights)
    dh = multiply(rows, stack.down, routing, backend, backward=True)
    if adapters.down is None:
        del rows
    gate_up, x = recall()
    if adapters.down is not None:
        _differentiate_down_adapter(rows, dh, gate_up, saved, operands, gradients)
        del rows
    dgate_up = _differentiate_gate(gate_up, dh, inner_products, saved, gate, gradients, overwrite)
    del dh
    dgate_up_bias = None
    if gradients.biases[0]:
        dgate_up_bias = sum_by_expert(dgate_up, routing, stack.gate_up.bias)
    lora_grad = None
    if adapters.gate_up is not None:
        assert x is not None
        lora_grad = _differentiate_gate_up_adapter(dgate_up, x, saved, operands, gradients)
    if gradients.x is not None:
        rows = multiply(dgate_up, stack.gate_up, routing, backend, backward=True, decoded=decoded)
        del dgate_up
        if adapters.gate_up is not None and lora_grad is not None:
            tile_rows = choose_tile(rows, backend, "forward").rows
            expand_(rows, lora_grad, adapters.gate_up.a, routing, tile_rows)
        combine(rows, routing, gradients.x)
    return dgate_up_bias, ddown_bias


def _differentiate_gate(
    gate_up: torch.Tensor,
    dh: torch.Tensor,
    inner_products: torch.Tensor,
    saved: SavedForward,
    gate: Gate,
    gradients: Gradients,
    overwrite: bool,
) -> torch.Tensor:
    """Return gate_up's gradient, and write the routing weights'; `overwrite` as `run_backward`."""
    positions, weights = saved.routing.positions, saved.weights
    dgate_up = gate_up if overwrite else torch.empty_like(gate_up)
    launch(triton_glue.gate_backward_kernel, (positions.numel(),),
        *(gate_up, dh, positions, weights, inner_products, dgate_up),
        *(weights if gradients.weights is None else gradients.weights, dh.shape[1], *gate),
        BLOCK=GATE_BLOCK, WEIGHT_GRADIENT=gradients.weights is not None,
        PARTIAL=saved.routing.is_partial,
    )  # fmt: skip
    return dgate_up


def _differentiate_down_adapter(
    rows: torch.Tensor,
    dh: torch.Tensor,
    gate_up: torch.Tensor,
    saved: SavedForward,
    operands: ExpertOperands,
    gradients: Gradients,
) -> None:
    """Add the adapter's share to dh, and its factors' gradients to their sums.

    `rows` are those of dout, [entries, hidden]; neither they nor dh include the routing weights.
    """
    adapter, sums = operands.adapters.down, gradients.adapters.down
    assert adapter is not None and sums is not None
    routing, weights = saved.routing, saved.weights
    tile_rows = choose_tile(rows, operands.backend, "forward").rows
    h = apply_gate(gate_up, routing, operands.gate)
    # A position of -1 writes to the element past the rows.
    row_weights = torch.empty(routing.rows + 1, dtype=torch.float32, device=weights.device)
    row_weights[routing.positions.flatten().long()] = weights.flatten().float()
    row_weights = row_weights[:-1]
    lora_grad = add_gradients_(sums, adapter, h, rows, routing, tile_rows, row_weights[:, None])
    expand_(dh, lora_grad, adapter.a, routing, tile_rows)


def _differentiate_gate_up_adapter(
    dgate_up: torch.Tensor,
    x: torch.Tensor,
    saved: SavedForward,
    operands: ExpertOperands,
    gradients: Gradients,
) -> torch.Tensor:
    """Add the factors' gradients to their sums, and return g as `add_gradients_` does."""
    adapter, sums = operands.adapters.gate_up, gradients.adapters.gate_up
    assert adapter is not None and sums is not None
    rows, _ = gather(x, saved.routing, saved.indices)
    tile_rows = choose_tile(rows, operands.backend, "forward").rows
    return add_gradients_(sums, adapter, rows, dgate_up, saved.routing, tile_rows)


def apply_gate(gate_up: torch.Tensor, routing: Routing, gate: Gate) -> torch.Tensor:
    """Apply the gate to gate_up's output [rows, 2 * inner]; return [rows, inner]."""
    inner = gate_up.shape[1] // 2
    h = torch.empty((gate_up.shape[0], inner), dtype=gate_up.dtype, device=gate_up.device)
    starts = routing.starts
    launch(triton_glue.gate_kernel, (gate_up.shape[0],),
        *(gate_up, h, starts, starts.numel() - 1, inner, *gate),
        BLOCK=GATE_BLOCK, PARTIAL=routing.is_partial,
    )  # fmt: skip
    return h


def multiply(
    a: torch.Tensor,
    weight: PackedWeight,
    routing: Routing,
    backend: str,
    backward: bool,
    decoded: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return sorted rows a [entries, in] times each expert's weight, plus bias: [entries, out].

    With `backward`, return a [entries, out] times W without bias: [entries, in]. "decode" takes the
    weights from `decode_all` if given, and otherwise decodes a chunk of experts at a time.
    """
    experts, out_features, groups, _ = weight.blocks.shape
    columns, depth = (groups * 32, out_features) if backward else (out_features, groups * 32)
    out = torch.empty((a.shape[0], columns), dtype=a.dtype, device=a.device)
    tile = choose_tile(a, backend, "backward" if backward else "forward")
    tma = gpu.tiles_of(a.device) == "sm_90" and a.dtype == torch.bfloat16 and tile.rows >= 64
    tiles = routing.tile_expert.numel() * -(-columns // tile.columns)
    programs = gpu.multiprocessors_of(a.device) * tile.programs
    grid = (min(tiles, programs * (SPREAD if routing.is_partial else 1)),)
    a_tiles = TensorDescriptor.from_tensor(a, [tile.rows, tile.depth]) if tma else a
    lists = (routing.starts, routing.tile_expert, routing.tile_starts)
    constants = {
        "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "BACKWARD": backward,
        "BIAS": not backward, "TMA": tma,
        "PRECISION": "ieee" if a.dtype == torch.float32 else "tf32",
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    if backend != "decode":
        sizes, words = (experts, columns, depth), weight.blocks.view(torch.int32)
        pointers = (a_tiles, words, weight.scales, weight.bias, out, *lists)
        launch(triton_products.packed_kernel, grid, *pointers, *sizes, PTX=_has_ptx(a), **constants)
        return out
    block = [1, tile.depth, tile.columns] if backward else [1, tile.columns, tile.depth]
    for first, last, chunk in _decode_chunks(weight, routing, a, decoded):
        w_tiles = TensorDescriptor.from_tensor(chunk, block) if tma else chunk
        pointers = (a_tiles, w_tiles, weight.bias, out, *lists)
        launch(
            triton_products.dense_kernel, grid, *pointers, first, last, columns, depth, **constants
        )
    return out


def _decode_chunks(
    weight: PackedWeight, routing: Routing, like: torch.Tensor, decoded: torch.Tensor | None
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield the first expert, the end and the weights of one chunk of experts after the other.

    Their memory is that of the chunk before, so a chunk's product must be launched at once.
    """
    experts, out_features, groups, _ = weight.blocks.shape
    if decoded is not None:
        yield 0, experts, decoded
        return
    expert_bytes = out_features * groups * 32 * like.element_size()
    count = max(1, min(experts, BUFFER_BYTES // expert_bytes))
    buffer = like.new_empty((count, out_features, groups * 32))
    for first in range(0, experts, count):
        last = min(experts, first + count)
        decode_into(buffer, weight, first, last, routing)
        yield first, last, buffer


def decode_all(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """Return the decoded weights of all experts, [experts, out, in]."""
    experts, out_features, groups, _ = weight.blocks.shape
    shape = (experts, out_features, groups * 32)
    buffer = torch.empty(shape, dtype=dtype, device=weight.blocks.device)
    decode_into(buffer, weight, 0, experts)
    return buffer


def decode_into(
    buffer: torch.Tensor,
    weight: PackedWeight,
    first: int,
    last: int,
    routing: Routing | None = None,
) -> None:
    """Decode the weights of experts [first, last) to the start of buffer [experts, out, in].

    If none of these experts has rows in the window of a routing, nothing is decoded.
    """
    words, scales = weight.blocks[first:last].view(torch.int32), weight.scales[first:last]
    grid = (-(-scales.numel() // (_DECODE_GROUPS * _DECODE_TURNS)),)
    is_partial = routing is not None and routing.is_partial
    launch(triton_products.decode_kernel, grid,
        *(words, scales, buffer, scales.numel()),
        *(words if routing is None else routing.tile_starts, first, last),
        GROUPS=_DECODE_GROUPS, TURNS=_DECODE_TURNS, PTX=_has_ptx(buffer), PARTIAL=is_partial,
        num_warps=8,
    )  # fmt: skip


def choose_tile(x: torch.Tensor, backend: str, direction: str) -> Tile:
    """Return the tile for a product with x's rows on x's device."""
    return tile_for(gpu.tiles_of(x.device), backend, direction, x.dtype == torch.float32)


def _has_ptx(values: torch.Tensor) -> bool:
    return values.dtype == torch.bfloat16 and values.device.type == "cuda"
