"""Runs experts with adapters in Triton's interpreter; experts/test_lora.py starts it.

Runs in its own process, because the interpreter must be chosen before Triton is imported. Prints
one JSON document: for each case the relative L2 errors against fp64, NaN if a result contains NaN.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import json
from typing import Any

import torch

from sparselong.kernels.experts import lora_triton as expert_lora_kernels
from sparselong.kernels.experts import routing as expert_routing
from sparselong.kernels.experts import triton_launch
from sparselong.kernels.experts.call import ExpertOperands
from sparselong.kernels.experts.lora import Adapter, Adapters
from tests.kernels.interpreted_experts import GATE, Case, draw
from tests.kernels.interpreter import patch_once
from tests.poisoned import PoisonedTorch
from tests.references.expert_mlp import expert_mlp_reference

RANK = 3  # not a multiple of any tile size
CASES = [
    (Case("ragged", 37), (0.5, 2.0)),
    (Case("gate_up_only", 9, hidden=96, inner=64), (0.5, None)),
    (Case("down_only", 9), (None, 2.0)),
    (Case("all_on_one_expert", 70, top_k=1, only=(3,)), (1.0, 1.0)),
    (Case("empty_experts", 40, experts=9, top_k=2, only=(1, 2, 7)), (1.0, 1.0)),
]


def draw_adapter(case: Case, out: int, width: int, scaling: float | None) -> Adapter | None:
    if scaling is None:
        return None
    a = torch.randn(case.experts, RANK, width) / width**0.5
    b = torch.randn(out, RANK, case.experts).permute(2, 0, 1)  # PEFT's layout of B
    return Adapter(a, b, scaling)


def run(case: Case, scalings: tuple, backend: str) -> dict[str, float]:
    """Return relative L2 errors of out and the gradients."""
    call, stack, dout = draw(case)
    adapters = Adapters(
        draw_adapter(case, 2 * case.inner, case.hidden, scalings[0]),
        draw_adapter(case, case.hidden, case.inner, scalings[1]),
    )
    operands = ExpertOperands(stack, adapters, GATE, backend).in_dtype(call.x.dtype)
    out, dx, dweights = (torch.full_like(t, torch.nan) for t in (call.x, call.x, call.weights))
    made: Any = triton_launch.run_forward(call, operands, out, keep=True)
    gate_up, routing = made
    saved = triton_launch.SavedForward(lambda: (gate_up, call.x), routing, *call[1:])
    gradients = triton_launch.Gradients(dx, dweights, (True, True), adapters.make_sums())
    biases = triton_launch.run_backward(dout, saved, operands, gradients, overwrite=True)
    got = [out, dx, dweights, *biases]
    got += [sums for sums in gradients.adapters.factors if sums is not None]

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        leaves.append(tensor.double().requires_grad_())
        return leaves[-1]

    leaves: list[torch.Tensor] = []
    x, weights = leaf(call.x), leaf(call.weights)
    biased = [(*weight[:2], leaf(weight.bias)) for weight in stack]
    adapted = [one and (leaf(one.a), leaf(one.b), one.scaling) for one in adapters]
    exact = expert_mlp_reference(x, call.indices, weights, tuple(biased), tuple(adapted), GATE)
    wanted = torch.autograd.grad(exact, leaves, dout.double())
    return {
        str(n): ((one.double() - want).norm() / (want.norm() + 1e-12)).item()
        for n, (one, want) in enumerate(zip(got, (exact, *wanted), strict=True))
    }


def main() -> None:
    patch_once()
    for module in (triton_launch, expert_routing, expert_lora_kernels):
        module.torch = PoisonedTorch()  # pyright: ignore[reportAttributeAccessIssue]
    results = {}
    for case, scalings in CASES:
        for backend in ("packed", "decode")[: 2 if case.name == "ragged" else 1]:
            results[f"{case.name} {backend}"] = run(case, scalings, backend)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
