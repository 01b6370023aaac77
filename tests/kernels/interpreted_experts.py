"""Runs the experts' kernels in Triton's interpreter on small cases; test_expert_gemm.py starts it.

A process of its own, because the interpreter must be chosen before Triton is imported. Prints one
JSON document: for each case and result the relative L2 error against fp64, NaN where a result held
NaN. The interpreter has no bf16 products, so all is fp32.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import dataclasses
import json
import weakref
from typing import Any

import torch

from sparselong.kernels.experts import routing as expert_routing
from sparselong.kernels.experts import triton_launch as expert_triton
from tests.kernels.interpreter import patch_once
from tests.poisoned import PoisonedTorch
from tests.references.expert_mlp import decode_reference, expert_mlp_reference

GATE = (1.702, 7.0)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; the name says why it is here."""

    name: str
    tokens: int
    experts: int = 5
    top_k: int = 4
    hidden: int = 64
    inner: int = 32
    only: tuple[int, ...] | None = None
    buffer_bytes: int | None = None


CASES = [
    Case("one_token", 1),
    Case("ragged", 37),
    Case("no_multiple_of_a_tile", 33, hidden=96, inner=96),
    Case("all_on_one_expert", 70, top_k=1, only=(3,)),
    Case("empty_experts", 40, experts=9, top_k=2, only=(1, 2, 7)),
    Case("first_and_last_empty", 9, experts=4, top_k=2, only=(1, 2)),
    Case("every_expert", 5, experts=4, top_k=4),
    Case("one_expert", 5, experts=1, top_k=1),
    Case("more_than_a_block_of_choices", 70, experts=3, top_k=2, hidden=32),
    Case("chunks_of_one_expert", 37, buffer_bytes=1),
    Case("a_last_chunk_that_is_short", 37, buffer_bytes=2 * 4 * 64 * 64),
]


def draw_stack(experts: int, out: int, width: int) -> expert_triton.Projection:
    """Random codes, scales of a published checkpoint's kind, and a bias."""
    blocks = torch.randint(0, 256, (experts, out, width // 32, 16), dtype=torch.uint8)
    scales = torch.randint(120, 126, (experts, out, width // 32), dtype=torch.uint8)
    return expert_triton.Projection(blocks, scales, torch.randn(experts, out))


def run(case: Case, backend: str) -> dict[str, float]:
    """Relative L2 errors of out and the gradients."""
    torch.manual_seed(len(case.name))
    x, dout = torch.randn(2, case.tokens, case.hidden)
    allowed = torch.tensor(case.only or range(case.experts))
    picks = [torch.randperm(len(allowed))[: case.top_k] for _ in range(case.tokens)]
    indices = allowed[torch.stack(picks)]
    weights = torch.rand(indices.shape)
    gate_up = draw_stack(case.experts, 2 * case.inner, case.hidden)
    down = draw_stack(case.experts, case.hidden, case.inner)
    call = (x, indices, weights, gate_up, down, GATE, backend)
    out, inferred, dx, dweights = (torch.full_like(t, torch.nan) for t in (x, x, x, weights))
    wide, routing = expert_triton.run_forward(*call, out)
    expert_triton.run_inference(*call, inferred)
    assert torch.equal(inferred, out)
    call = (dout, wide, routing, indices, weights, gate_up, down, GATE, backend)
    biases = expert_triton.run_backward(*call, dx, dweights, (True, True))
    leaves = [t.double().requires_grad_() for t in (x, weights, gate_up.bias, down.bias)]
    exact = expert_mlp_reference(
        leaves[0], indices, leaves[1], gate_up[:2], leaves[2], down[:2], leaves[3], *GATE
    )
    wanted = torch.autograd.grad(exact, leaves, dout.double())
    names = ("out", "dx", "dweights", "dgate_up_bias", "ddown_bias")
    pairs = zip((out, dx, dweights, *biases), (exact, *wanted), strict=True)
    return {
        name: ((got.double() - want).norm() / (want.norm() + 1e-12)).item()
        for name, (got, want) in zip(names, pairs, strict=True)
    }


def count_inexact_decodings() -> int:
    """Of all bytes times all scales, how many values are not bit-exact in fp32."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 255, 1, 1)
    scales = torch.arange(255, dtype=torch.uint8).view(1, 255, 1).repeat(1, 1, 16)
    stack = expert_triton.Projection(blocks, scales, scales)
    buffer = torch.full((1, 255, 512), float("nan"))
    expert_triton.decode_into(buffer, stack, 0, 1)
    exact = decode_reference(blocks, scales).float()
    return int((buffer.view(torch.int32) != exact.view(torch.int32)).sum())


def count_held() -> dict[str, int]:
    """By function, whether gate_up's output is there while down's is made."""
    stack = draw_stack(2, 64, 32), draw_stack(2, 32, 32)
    call = (torch.randn(3, 32), torch.tensor([[0], [1], [1]]), torch.rand(3, 1), *stack)
    multiply, found = expert_triton.multiply, []

    def watch(*args: Any, **kwargs: Any) -> torch.Tensor:
        alive = [ref() is not None for ref in made]
        out = multiply(*args, **kwargs)
        made.append(weakref.ref(out))
        found.append(sum(alive))
        return out

    held = {}
    expert_triton.multiply = watch
    for function in (expert_triton.run_forward, expert_triton.run_inference):
        made: list[weakref.ref[torch.Tensor]] = []
        function(*call, GATE, "packed", torch.empty(3, 32))
        held[function.__name__] = found[-1]
    expert_triton.multiply = multiply
    return held


def main() -> None:
    patch_once()
    expert_triton.torch = expert_routing.torch = PoisonedTorch()  # pyright: ignore[reportAttributeAccessIssue]
    results: dict[str, dict[str, float]] = {}
    default = expert_triton.BUFFER_BYTES
    for case in CASES:
        expert_triton.BUFFER_BYTES = case.buffer_bytes or default
        for backend in ("decode",) if case.buffer_bytes else ("decode", "packed"):
            results[f"{case.name} {backend}"] = run(case, backend)
    results["decoding"] = {"inexact": count_inexact_decodings()}
    print(json.dumps(results | {"held": count_held()}))


if __name__ == "__main__":
    main()
