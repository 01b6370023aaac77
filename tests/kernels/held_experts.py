"""Cases of passes over held experts, and their errors against an fp64 reference.

For plain torch on a CPU, the interpreted kernels and the compiled ones.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch

from sparselong.kernels.expert_stack import ExpertStack, Gate, PackedWeight
from sparselong.kernels.experts import (
    Adapter,
    Adapters,
    ExpertCall,
    ExpertOperands,
    Gradients,
    differentiate_held,
    run_held,
)
from tests.references.expert_mlp import expert_mlp_reference

GATE = Gate(1.702, 7.0)
RANK = 3  # not a multiple of any tile size
SCALINGS = (0.5, 2.0)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; the name says what it covers.

    Attributes:
        ends: where the parts of the experts end, each held by one process.
        only: the experts that tokens are routed to; None: all.
        empty: index of rows that are routed to no expert, and hold NaN.
        adapted: which projections have adapters.
        window_rows: `WINDOW_ROWS`.
        interpreted: backends for which the case is worth the interpreter's time.
    """

    name: str
    rows: int
    ends: tuple[int, ...] = (2, 5)
    top_k: int = 3
    only: tuple[int, ...] | None = None
    empty: tuple[int, ...] = ()
    adapted: tuple[bool, bool] = (True, True)
    window_rows: int = 1024
    interpreted: tuple[str, ...] = ()
    hidden: int = 64
    inner: int = 32

    @property
    def parts(self) -> list[range]:
        """The experts of each process."""
        return [range(*pair) for pair in itertools.pairwise((0, *self.ends))]


CASES = [
    Case("one_row", 1, interpreted=("decode",)),
    Case("ragged", 37),
    Case("no_adapters", 37, adapted=(False, False), interpreted=("packed",)),
    Case("gate_up_adapter", 19, adapted=(True, False)),
    Case("down_adapter", 19, adapted=(False, True)),
    Case("one_part_holds_all", 19, ends=(5,)),
    Case("more_choices_than_held_experts", 21, ends=(1, 2, 6), top_k=5, interpreted=("packed",)),
    Case("empty_experts", 40, ends=(4, 9), top_k=2, only=(1, 2, 7)),
    Case("all_on_one_expert", 70, top_k=1, only=(3,)),
    Case("padding_rows", 37, empty=(0, 5, 6, 36), interpreted=("packed",)),
    Case("only_padding_rows", 3, empty=(0, 1, 2), interpreted=("packed",)),
    Case("windows", 25, ends=(1, 5), window_rows=20, interpreted=("packed", "decode")),
    Case("windows_that_hold_few_rows", 37, window_rows=7, empty=(0, 5, 36)),
    Case("windows_of_one_expert", 70, top_k=1, only=(3,), window_rows=48, interpreted=("packed",)),
    Case("last_window_is_full", 32, top_k=2, window_rows=16, only=(0, 1)),
    Case("more_than_a_block_of_choices", 70, ends=(1, 3), top_k=2, hidden=32, window_rows=50),
]


@dataclasses.dataclass
class Layer:
    """A whole layer's call, its gradient, and all its experts."""

    call: ExpertCall
    dout: torch.Tensor
    stack: ExpertStack
    adapters: Adapters


def draw(case: Case, dtype: torch.dtype, device: str = "cpu") -> Layer:
    """Return the layer of a case; factors are at least fp32."""
    torch.manual_seed(len(case.name))
    experts = case.ends[-1]
    x, dout = torch.randn(2, case.rows, case.hidden).to(dtype)
    allowed = torch.tensor(case.only or range(experts))
    picks = [torch.randperm(len(allowed))[: case.top_k] for _ in range(case.rows)]
    indices = allowed[torch.stack(picks)]
    weights = torch.rand(indices.shape).to(dtype)
    for row in case.empty:
        indices[row], x[row], weights[row] = -1, torch.nan, torch.nan
    call = ExpertCall(*(tensor.to(device) for tensor in (x, indices, weights)))
    packed, adapters = [], []
    sizes = ((2 * case.inner, case.hidden), (case.hidden, case.inner))
    for (out, width), adapted, scaling in zip(sizes, case.adapted, SCALINGS, strict=True):
        shape = (experts, out, width // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        low = 123 - (width.bit_length() + 1) // 2
        scales = torch.randint(low, low + 5, shape, dtype=torch.uint8)
        bias = torch.randn(experts, out).to(dtype)
        packed.append(PackedWeight(*(t.to(device) for t in (blocks, scales, bias))))
        factor = torch.promote_types(dtype, torch.float32)
        a = (torch.randn(experts, RANK, width) / width**0.5).to(device, factor)
        b = torch.randn(out, RANK, experts).permute(2, 0, 1).to(device, factor)  # PEFT's layout
        adapters.append(Adapter(a, b, scaling) if adapted else None)
    return Layer(call, dout.to(device), ExpertStack(*packed), Adapters(*adapters))


def take(layer: Layer, held: range, backend: str) -> ExpertOperands:
    """Return the held experts' operands, as a process that holds nothing else has them."""

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[held.start : held.stop].clone()

    stack = ExpertStack(*(PackedWeight(*map(cut, weight)) for weight in layer.stack))
    adapters = (one and one._replace(a=cut(one.a), b=cut(one.b)) for one in layer.adapters)
    return ExpertOperands(stack, Adapters(*adapters), GATE, backend)


def run(layer: Layer, held: range, backend: str) -> dict[str, torch.Tensor]:
    """Return one process's output and gradients, from buffers that hold NaN before.

    The sums of adapters' gradients start with 1, which is taken off again.
    """
    operands, experts = take(layer, held, backend), layer.stack.experts
    x, _, weights = layer.call
    out, dx, dweights = (torch.full_like(tensor, torch.nan) for tensor in (x, x, weights))
    rows = run_held(layer.call, operands, held, out, experts=experts)
    sums = operands.adapters.make_sums()
    made = [factor for factor in sums.factors if factor is not None]
    for factor in made:
        factor += 1
    gradients = Gradients(dx, dweights, adapters=sums)
    differentiate_held(
        *differentiated(layer), operands, held, gradients, experts=experts, rows=rows
    )
    return dict(zip(names_of(layer), (out, dx, dweights, *(f - 1 for f in made)), strict=True))


def differentiated(layer: Layer) -> tuple[ExpertCall, Callable[[], torch.Tensor]]:
    """Return `differentiate_held`'s arguments of a layer: its call, and its rows, which arrive."""
    return layer.call._replace(x=layer.dout), lambda: layer.call.x


def names_of(layer: Layer) -> list[str]:
    """Return the names of a pass's results."""
    adapted = [name for name, one in zip(("gate_up", "down"), layer.adapters, strict=True) if one]
    return ["out", "x", "weights", *(f"{name}_{part}" for name in adapted for part in "ab")]


def run_exactly(layer: Layer, held: range) -> dict[str, torch.Tensor]:
    """Return the same results from the fp64 reference, which sees the held experts alone."""
    operands, leaves = take(layer, held, "torch"), []

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        leaves.append(tensor.double().nan_to_num().requires_grad_())
        return leaves[-1]

    x, weights = leaf(layer.call.x), leaf(layer.call.weights)
    adapters: Any = tuple(one and (*map(leaf, one[:2]), one.scaling) for one in operands.adapters)
    local = layer.call.indices - held.start
    out = expert_mlp_reference(x, local, weights, operands.stack, adapters, GATE)
    grads = torch.autograd.grad(out, leaves, layer.dout.double())
    return dict(zip(names_of(layer), (out, *grads), strict=True))


def measure(case: Case, dtype: torch.dtype, backend: str) -> dict[str, float]:
    """Return every part's relative L2 errors by result, NaN if it holds NaN."""
    layer, errors = draw(case, dtype), {}
    for held in case.parts:
        got, wanted = run(layer, held, backend), run_exactly(layer, held)
        for name, want in wanted.items():
            error = (got[name].double() - want).norm() / (want.norm() + 1e-12)
            errors[f"{name} of {held.start} to {held.stop - 1}"] = error.item()
    return errors
