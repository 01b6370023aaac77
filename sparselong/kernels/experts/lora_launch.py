"""The order of products in the experts' pass with adapters; `expert_lora.py` has the maths.

The packed products, sorting and gate are those of the pass without adapters; the narrow products
are added around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from sparselong.kernels.experts import routing as expert_routing
from sparselong.kernels.experts import triton_launch as expert_triton
from sparselong.kernels.experts.lora_triton import add_gradient_, expand_, shrink
from sparselong.kernels.experts.routing import Routing
from sparselong.kernels.experts.triton_launch import Projection


class Factors(NamedTuple):
    """One stack's adapter in the rows' dtype: a [E, r, in], b [E, r, out] (a view of B), s."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    @classmethod
    def of(cls, a: torch.Tensor, b: torch.Tensor, scaling: float, dtype: torch.dtype) -> Factors:
        """From A [E, r, in] and B [E, out, r] of any dtype and strides."""
        a, b = (tensor.detach().to(dtype).contiguous() for tensor in (a, b))
        return cls(a, b.transpose(1, 2), scaling)


class Stacks(NamedTuple):
    """What a pass multiplies with."""

    gate_up: Projection
    down: Projection
    gate_up_factors: Factors | None
    down_factors: Factors | None
    gate: tuple[float, float]
    backend: str

    @classmethod
    def of(cls, tensors: Sequence[Any], call: Sequence[Any], dtype: torch.dtype) -> Stacks:
        """From A, B of gate_up, A, B of down, the six stack tensors; (gate, scalings, backend)."""
        gate, scalings, backend = call
        gate_up_factors, down_factors = (
            None if a is None else Factors.of(a, b, scaling, dtype)
            for a, b, scaling in zip(tensors[:4:2], tensors[1:4:2], scalings, strict=True)
        )
        gate_up, down = Projection(*tensors[4:7]), Projection(*tensors[7:10])
        return cls(gate_up, down, gate_up_factors, down_factors, gate, backend)


def run_gate_up(
    x: torch.Tensor, indices: torch.Tensor, stacks: Stacks
) -> tuple[torch.Tensor, Routing]:
    """(gate_up's output with its adapter [entries, 2 * inner], routing)."""
    rows_of_tile = _tile_rows(x, stacks.backend)
    routing = expert_routing.sort_by_expert(indices, stacks.gate_up.blocks.shape[0], rows_of_tile)
    rows, _ = expert_routing.gather(x, routing, indices)
    wide = _multiply(rows, stacks.gate_up, routing, stacks, backward=False)
    _add_adapter(wide, rows, stacks.gate_up_factors, routing, rows_of_tile)
    return wide, routing


def run_forward(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    stacks: Stacks,
    out: torch.Tensor,
) -> tuple[torch.Tensor, Routing]:
    """(gate_up's output, routing); the sum goes to out [tokens, hidden], contiguous."""
    wide, routing = run_gate_up(x, indices, stacks)
    h = expert_triton.apply_gate(wide, stacks.gate)
    rows = _multiply(h, stacks.down, routing, stacks, backward=False)
    _add_adapter(rows, h, stacks.down_factors, routing, _tile_rows(x, stacks.backend))
    del h
    expert_routing.combine(rows, routing, out, weights)
    return wide, routing


def run_backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    wide: torch.Tensor,
    routing: Routing,
    stacks: Stacks,
    grads: Sequence[torch.Tensor | None],
    dx: torch.Tensor,
    dweights: torch.Tensor,
) -> None:
    """Gradients of x and the routing weights, to `dx` and `dweights`, contiguous; those of A and B
    are added to `grads`.

    `wide` is written over by its gradient.

    `grads`: fp32, [E, r, in] and [E, out, r] of gate_up, then of down; None without an adapter.
    """
    tile_rows = _tile_rows(x, stacks.backend)
    gate_up_a, gate_up_b, down_a, down_b = grads
    rows, inner_products = expert_routing.gather(
        dout.contiguous(), routing, indices, stacks.down.bias
    )
    dh = _multiply(rows, stacks.down, routing, stacks, backward=True)
    if stacks.down_factors is not None and down_a is not None and down_b is not None:
        a, b, scaling = stacks.down_factors
        h = expert_triton.apply_gate(wide, stacks.gate)
        sorted_weights = torch.empty(weights.numel(), dtype=torch.float32, device=weights.device)
        sorted_weights[routing.positions.flatten().long()] = weights.flatten().float()
        sorted_weights = sorted_weights[:, None]
        narrow = shrink(rows, b, scaling, routing, tile_rows)
        expand_(dh, narrow, a, routing, tile_rows)
        add_gradient_(down_a, narrow * sorted_weights, h, routing)
        narrow = shrink(h, a, scaling, routing, tile_rows)
        add_gradient_(down_b.transpose(1, 2), narrow * sorted_weights, rows, routing)
        del h
    del rows
    dwide = wide
    expert_triton.glue.gate_backward_kernel[(wide.shape[0],)](
        *(wide, dh, routing.positions, weights, inner_products, dwide, dweights),
        *(dh.shape[1], *stacks.gate),
        BLOCK=expert_triton.GATE_BLOCK, WEIGHT_GRADIENT=True,
    )  # fmt: skip
    del dh
    narrow = None
    if stacks.gate_up_factors is not None and gate_up_a is not None and gate_up_b is not None:
        a, b, scaling = stacks.gate_up_factors
        rows, _ = expert_routing.gather(x, routing, indices)
        narrow = shrink(rows, a, scaling, routing, tile_rows)
        add_gradient_(gate_up_b.transpose(1, 2), narrow, dwide, routing)
        narrow = shrink(dwide, b, scaling, routing, tile_rows)
        add_gradient_(gate_up_a, narrow, rows, routing)
        del rows
    rows = _multiply(dwide, stacks.gate_up, routing, stacks, backward=True)
    if stacks.gate_up_factors is not None and narrow is not None:
        expand_(rows, narrow, stacks.gate_up_factors.a, routing, tile_rows)
    expert_routing.combine(rows, routing, dx)


def _add_adapter(
    out: torch.Tensor, rows: torch.Tensor, factors: Factors | None, routing: Routing, tile_rows: int
) -> None:
    if factors is not None:
        narrow = shrink(rows, factors.a, factors.scaling, routing, tile_rows)
        expand_(out, narrow, factors.b, routing, tile_rows)


def _multiply(
    rows: torch.Tensor, weight: Projection, routing: Routing, stacks: Stacks, backward: bool
) -> torch.Tensor:
    return expert_triton.multiply(rows, weight, routing, stacks.backend, backward)


def _tile_rows(x: torch.Tensor, backend: str) -> int:
    return expert_triton.choose_tile(x, backend, "forward").rows
