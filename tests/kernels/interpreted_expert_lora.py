"""Runs the experts' pass with adapters in Triton's interpreter; test_expert_lora.py starts it.

A process of its own, because the interpreter must be chosen before Triton is imported. Prints one
JSON document: for each case the relative L2 errors against fp64 (NaN where a result held NaN).
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import json

import torch

from sparselong.kernels.experts import lora_launch as expert_lora_triton
from sparselong.kernels.experts import lora_triton as expert_lora_kernels
from sparselong.kernels.experts import routing as expert_routing
from sparselong.kernels.experts import triton_launch as expert_triton
from tests.kernels.interpreted_experts import GATE, Case, draw_stack
from tests.kernels.interpreter import patch_once
from tests.poisoned import PoisonedTorch
from tests.references.expert_lora import expert_lora_reference

RANK = 3  # no multiple of anything
CASES = [
    (Case("ragged", 37), (0.5, 2.0)),
    (Case("gate_up_only", 9, hidden=96, inner=64), (0.5, None)),
    (Case("down_only", 9), (None, 2.0)),
    (Case("all_on_one_expert", 70, top_k=1, only=(3,)), (1.0, 1.0)),
    (Case("empty_experts", 40, experts=9, top_k=2, only=(1, 2, 7)), (1.0, 1.0)),
]


def run(case: Case, scalings: tuple, backend: str) -> dict[str, float]:
    torch.manual_seed(len(case.name))
    x, dout = torch.randn(2, case.tokens, case.hidden)
    allowed = torch.tensor(case.only or range(case.experts))
    picks = [torch.randperm(len(allowed))[: case.top_k] for _ in range(case.tokens)]
    indices = allowed[torch.stack(picks)]
    weights = torch.rand(indices.shape)
    gate_up = draw_stack(case.experts, 2 * case.inner, case.hidden)
    down = draw_stack(case.experts, case.hidden, case.inner)
    factors = []
    for scaling, out, width in (
        (scalings[0], 2 * case.inner, case.hidden),
        (scalings[1], case.hidden, case.inner),
    ):
        a = torch.randn(case.experts, RANK, width) / width**0.5
        b = torch.randn(out, RANK, case.experts).permute(2, 0, 1)  # as PEFT lays B out
        factors += [None, None] if scaling is None else [a, b]
    call = (GATE, tuple(s or 0.0 for s in scalings), backend)
    stacks = expert_lora_triton.Stacks.of([*factors, *gate_up, *down], call, x.dtype)
    out, dx, dw = (torch.full_like(t, torch.nan) for t in (x, x, weights))
    wide, routing = expert_lora_triton.run_forward(x, indices, weights, stacks, out)
    grads = [None if t is None else torch.zeros_like(t) for t in factors]
    given = (dout, x, indices, weights, wide, routing, stacks)
    expert_lora_triton.run_backward(*given, grads, dx, dw)
    leaves = [None if t is None else t.double().requires_grad_() for t in (x, weights, *factors)]
    adapters = [
        None if leaves[n] is None else (leaves[n], leaves[n + 1], scaling)
        for n, scaling in zip((2, 4), scalings, strict=True)
    ]
    exact = expert_lora_reference(leaves[0], indices, leaves[1], gate_up, down, *adapters, *GATE)
    given = [leaf for leaf in leaves if leaf is not None]
    wanted = torch.autograd.grad(exact, given, dout.double())
    got = (out, dx, dw, *(g for g in grads if g is not None))
    pairs = zip(got, (exact, *wanted), strict=True)
    return {
        str(n): ((one.double() - want).norm() / (want.norm() + 1e-12)).item()
        for n, (one, want) in enumerate(pairs)
    }


def main() -> None:
    patch_once()
    for module in (expert_triton, expert_routing, expert_lora_kernels, expert_lora_triton):
        module.torch = PoisonedTorch()  # pyright: ignore[reportAttributeAccessIssue]
    results = {}
    for case, scalings in CASES:
        for backend in ("packed", "decode")[: 2 if case.name == "ragged" else 1]:
            results[f"{case.name} {backend}"] = run(case, scalings, backend)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
