"""Passes over some of a layer's experts: the share of one process that holds only those.

Rows arrive with the layer's expert indices; an index of -1 routes to no expert. Of each row's
weighted sum, only the terms of the held experts are computed here; added over the processes that
share the layer's experts they make the whole (`parts.py`).

Any number of the routed tokens may go to held experts, from none to all. So that memory does not
depend on that number, the products run over windows of at most `WINDOW_ROWS` of the rows sorted by
expert. Each routed token to a held expert lies in exactly one window; usually there is one, and the
host learns whether there are more while the device works on it. `torch` divides the tokens instead,
which bounds memory as well.

A window's rows take, beside lists of integers, hidden + 2 * inner or 3 * inner values each in the
forward pass, and hidden + 3 * inner in the backward pass, hidden + 4 * inner with an adapter of
down: at most 0.53 GB in gpt-oss's shape in bf16. `decode` adds its buffer of weights.

Between the two passes only the order of the rows is kept, 4 bytes a routed token.
`differentiate_held` computes gate_up's output again, as a checkpointed layer does. The biases are
frozen.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from sparselong.kernels.experts.call import ExpertCall, ExpertOperands, Gradients
from sparselong.kernels.experts.choice import BACKENDS
from sparselong.kernels.experts.op import choose, slices
from sparselong.kernels.experts.torch_backend import differentiate_torch, sum_held_torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from sparselong.kernels.experts.routing import HeldRows, Routing

WINDOW_ROWS = 18_432
"""Most rows sorted by expert that are processed at once.

An eighth more than a process's share of gpt-oss's routing with 4,096 tokens a process, so that
usual imbalance needs no second window."""


def choose_held(x: torch.Tensor, entries: int, experts: int) -> str:
    """Return the measured table's backend for `run_held` and `differentiate_held`.

    The held experts' expected rows per expert are those of the whole layer.

    Args:
        x: [rows, hidden].
        entries: number of routed tokens of the call, rows * top_k.
        experts: number of experts in the layer.

    Raises:
        ValueError: x's dtype does not suit its device.
    """
    backend = choose(x, entries, experts, None)
    return "small" if backend == "generation" else backend


def run_held(
    call: ExpertCall, operands: ExpertOperands, held: range, out: torch.Tensor, *, experts: int
) -> HeldRows | None:
    """Write the held experts' share of each row's weighted sum to `out`.

    It is zero for rows that are routed to none of them. A row whose routed tokens lie in several
    windows is rounded to out's dtype once per window. Sums in fp64 are exact: rounded, those of
    all parts of a layer have the bits of the whole layer's without gradients.

    Args:
        call: rows and their routing; indices are the layer's, -1 is no expert.
        operands: weights and adapters of the held experts, in order; its backend is "torch",
            "small", "packed" or "decode".
        held: which of the layer's experts those are.
        out: [rows, hidden], floating, contiguous, overwritten.
        experts: number of experts in the layer.

    Returns:
        The sorted rows, for `differentiate_held`; None if they were not sorted.

    Raises:
        ValueError: An argument does not fit; the message names it. An index outside [-1, experts)
            fails a device-side assertion on a GPU.
    """
    _check(call, operands, held, experts)
    if call.x.shape[0] == 0:
        return None
    if operands.backend == "torch":
        with torch.no_grad():
            for part in _parts(call):
                out[part] = sum_held_torch(call.part(part), operands, held, range(-1, experts))
        return None
    from sparselong.kernels.experts import triton_launch

    call, operands = call.contiguous(), operands.in_dtype(call.x.dtype)
    with torch.cuda.device_of(out):
        rows = triton_launch.sort_held(call, operands, held, experts, WINDOW_ROWS)
        for routing in rows.windows():
            exact = out.dtype == torch.float64
            triton_launch.run_forward(call, operands, out, False, routing, exact)
    return rows


def differentiate_held(
    call: ExpertCall,
    arrive: Callable[[], torch.Tensor],
    operands: ExpertOperands,
    held: range,
    gradients: Gradients,
    *,
    experts: int,
    rows: HeldRows | None,
) -> None:
    """Fill `gradients` with the held experts' share.

    Args:
        call: the routing of `run_held`, and in place of rows the gradient of its output.
        arrive: returns the rows of `run_held`, [rows, hidden]; called once, after the work that
            does not need them.
        operands: as in `run_held`.
        held: as in `run_held`.
        gradients: a routing weight's is zero where the expert is not held; the sums of adapters are
            accumulated into, and have the factors' order and shapes.
        experts: as in `run_held`.
        rows: what `run_held` returned for this routing; None: sort again.

    Raises:
        ValueError: As for `run_held`, or the gradient of a bias is asked for.
    """
    _check(call, operands, held, experts)
    if any(gradients.biases):
        raise ValueError("gradients.biases: requested; allowed: none, held experts' are frozen")
    if operands.backend == "torch" or not len(call.x):
        given = call._replace(x=arrive())
        for part in _parts(given):
            arguments = (call.x[part], given.part(part), operands, held, gradients.part(part))
            differentiate_torch(*arguments, experts)
        return
    from sparselong.kernels.experts import triton_launch

    call, operands = call.contiguous(), operands.in_dtype(call.x.dtype)
    if gradients.weights is not None:
        gradients.weights.zero_()  # each window then writes those of its own routed tokens
    with torch.cuda.device_of(call.x):
        rows = rows or triton_launch.sort_held(call, operands, held, experts, WINDOW_ROWS)
        _differentiate_windows(call, arrive, operands, gradients, rows)


def _differentiate_windows(
    call: ExpertCall,
    arrive: Callable[[], torch.Tensor],
    operands: ExpertOperands,
    gradients: Gradients,
    rows: HeldRows,
) -> None:
    from sparselong.kernels.experts import triton_launch

    dout, indices, weights = call
    arrived = functools.cache(lambda: arrive().contiguous())
    for routing in rows.windows():

        def recall(routing: Routing = routing) -> tuple[torch.Tensor, torch.Tensor]:
            x = arrived()
            return triton_launch.run_gate_up(x, indices, operands, routing), x

        saved = triton_launch.SavedForward(recall, routing, indices, weights)
        triton_launch.run_backward(dout, saved, operands, gradients, overwrite=True)


def _parts(call: ExpertCall) -> list[slice]:
    """Return slices of the rows with at most WINDOW_ROWS routed tokens each; without rows none."""
    return slices(len(call.x), max(1, WINDOW_ROWS // call.indices.shape[1])) if len(call.x) else []


def _check(call: ExpertCall, operands: ExpertOperands, held: range, experts: int) -> None:
    """Raise ValueError if an argument of a pass does not fit; the message names it."""
    call.check(experts)
    operands.stack.check(call.x)
    operands.adapters.check(operands.stack)
    if operands.backend == "generation" or operands.backend not in BACKENDS:
        raise ValueError(f"backend: {operands.backend!r}; allowed: torch, small, packed, decode")
    if held.step != 1 or not 0 <= held.start < held.stop <= experts:
        raise ValueError(f"held: {held}; allowed: consecutive experts of the layer's {experts}")
    if len(held) != operands.stack.experts:
        raise ValueError(f"held: {held}; allowed: as many as the stack's {operands.stack.experts}")
