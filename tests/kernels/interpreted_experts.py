"""Runs the expert kernels in Triton's interpreter on small cases; experts/test_op.py starts it.

Runs in its own process, because the interpreter must be chosen before Triton is imported. Prints
one JSON document: for each case and result the relative L2 error against fp64, NaN if the result
contains NaN. The interpreter has no bf16 products, so everything is fp32.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import dataclasses
import json
import weakref
from typing import Any

import torch
from triton.runtime.errors import InterpreterError

from sparselong.kernels.expert_stack import ExpertStack, Gate, PackedWeight
from sparselong.kernels.experts import routing as expert_routing
from sparselong.kernels.experts import triton_launch
from sparselong.kernels.experts.call import ExpertCall, ExpertOperands
from sparselong.kernels.experts.lora import NO_ADAPTERS
from tests.kernels.interpreter import patch_once
from tests.poisoned import PoisonedTorch
from tests.references.expert_mlp import decode_reference, expert_mlp_reference

GATE = Gate(1.702, 7.0)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; the name says what it covers."""

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
    Case("chunks_of_one_expert", 37, buffer_bytes=1),
    Case("a_last_chunk_that_is_short", 37, buffer_bytes=2 * 4 * 64 * 64),
]


def draw_weight(experts: int, out: int, width: int) -> PackedWeight:
    """Draw random codes, scales as in a published checkpoint, and a bias."""
    blocks = torch.randint(0, 256, (experts, out, width // 32, 16), dtype=torch.uint8)
    scales = torch.randint(120, 126, (experts, out, width // 32), dtype=torch.uint8)
    return PackedWeight(blocks, scales, torch.randn(experts, out))


def draw(case: Case) -> tuple[ExpertCall, ExpertStack, torch.Tensor]:
    """Return the case's call, weights and dout."""
    torch.manual_seed(len(case.name))
    x, dout = torch.randn(2, case.tokens, case.hidden)
    allowed = torch.tensor(case.only or range(case.experts))
    picks = [torch.randperm(len(allowed))[: case.top_k] for _ in range(case.tokens)]
    indices = allowed[torch.stack(picks)]
    call = ExpertCall(x, indices, torch.rand(indices.shape))
    gate_up = draw_weight(case.experts, 2 * case.inner, case.hidden)
    down = draw_weight(case.experts, case.hidden, case.inner)
    return call, ExpertStack(gate_up, down), dout


def run(case: Case, backend: str) -> dict[str, float]:
    """Return relative L2 errors of out and the gradients."""
    call, stack, dout = draw(case)
    operands = ExpertOperands(stack, NO_ADAPTERS, GATE, backend)
    given = (call.x, call.x, call.x, call.weights)
    out, inferred, dx, dweights = (torch.full_like(tensor, torch.nan) for tensor in given)
    made: Any = triton_launch.run_forward(call, operands, out, keep=True)
    triton_launch.run_forward(call, operands, inferred, keep=False)
    assert torch.equal(inferred, out)
    added, residual = torch.full_like(out, torch.nan), torch.randn_like(out)
    triton_launch.run_forward(call, operands, added, keep=False, residual=residual)
    assert torch.equal(added, residual + out)
    gate_up, routing = made
    saved = triton_launch.SavedForward(lambda: (gate_up, None), routing, *call[1:])
    gradients = triton_launch.Gradients(dx, dweights, (True, True))
    biases = triton_launch.run_backward(dout, saved, operands, gradients, overwrite=False)
    given = (call.x, call.weights, stack.gate_up.bias, stack.down.bias)
    leaves = [tensor.double().requires_grad_() for tensor in given]
    biased = ((*stack.gate_up[:2], leaves[2]), (*stack.down[:2], leaves[3]))
    exact = expert_mlp_reference(leaves[0], call.indices, leaves[1], biased, gate=GATE)
    wanted = torch.autograd.grad(exact, leaves, dout.double())
    names = ("out", "dx", "dweights", "dgate_up_bias", "ddown_bias")
    pairs = zip((out, dx, dweights, *biases), (exact, *wanted), strict=True)
    return {
        name: ((got.double() - want).norm() / (want.norm() + 1e-12)).item()
        for name, (got, want) in zip(names, pairs, strict=True)
    }


def count_inexact_decodings() -> int:
    """Count the values, over all bytes and scales, that are not bit-exact in fp32."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 255, 1, 1)
    scales = torch.arange(255, dtype=torch.uint8).view(1, 255, 1).repeat(1, 1, 16)
    buffer = torch.full((1, 255, 512), float("nan"))
    triton_launch.decode_into(buffer, PackedWeight(blocks, scales, scales), 0, 1)
    exact = decode_reference(blocks, scales).float()
    return int((buffer.view(torch.int32) != exact.view(torch.int32)).sum())


def find_refused_indices() -> list[int]:
    """Return which indices the sort refuses in a layer of five experts."""
    refused = []
    for index in (*range(-2, 8), 1 << 32):
        indices = torch.full((3, 2), 1)
        indices[2, 1] = index
        try:
            expert_routing.sort_by_expert(indices, 5, 32)
        except InterpreterError:
            refused.append(index)
    return refused


def sort_many(dtype: torch.dtype) -> dict[str, bool]:
    """Compare the sort of entries that fill more than one of its blocks with torch's."""
    indices = torch.randint(0, 7, (1500, 3), dtype=dtype)
    indices[:, 1] = 2
    indices[indices == 5] = 4
    routing = expert_routing.sort_by_expert(indices, 7, 64)
    expected = torch.sort(indices.flatten(), stable=True).indices.argsort()
    counts = torch.bincount(indices.flatten(), minlength=7)
    tiles = (counts + 63) // 64
    experts = torch.arange(7).repeat_interleave(tiles)
    pairs = {
        "positions": (routing.positions.flatten(), expected),
        "rows": (routing.starts.diff(), counts),
        "tiles": (routing.tile_starts.diff(), tiles),
        "experts": (routing.tile_expert[: len(experts)], experts),
        "zero": (routing.starts[0] + routing.tile_starts[0], torch.tensor(0)),
    }
    return {name: torch.equal(got.long(), want) for name, (got, want) in pairs.items()}


def count_held() -> dict[str, int]:
    """Count the gate_up outputs alive while down runs, kept and not kept."""
    call = ExpertCall(torch.randn(3, 32), torch.tensor([[0], [1], [1]]), torch.rand(3, 1))
    stack = ExpertStack(draw_weight(2, 64, 32), draw_weight(2, 32, 32))
    operands = ExpertOperands(stack, NO_ADAPTERS, GATE, "packed")
    multiply, found = triton_launch.multiply, []

    def watch(*args: Any, **kwargs: Any) -> torch.Tensor:
        alive = [ref() is not None for ref in made]
        out = multiply(*args, **kwargs)
        made.append(weakref.ref(out))
        found.append(sum(alive))
        return out

    held = {}
    triton_launch.multiply = watch
    for name, keep in (("kept", True), ("not kept", False)):
        made: list[weakref.ref[torch.Tensor]] = []
        triton_launch.run_forward(call, operands, torch.empty(3, 32), keep)
        held[name] = found[-1]
    triton_launch.multiply = multiply
    return held


def main() -> None:
    patch_once()
    triton_launch.torch = expert_routing.torch = PoisonedTorch()  # pyright: ignore[reportAttributeAccessIssue]
    results: dict[str, dict[str, float]] = {}
    default = triton_launch.BUFFER_BYTES
    for case in CASES:
        triton_launch.BUFFER_BYTES = case.buffer_bytes or default
        for backend in ("decode",) if case.buffer_bytes else ("decode", "packed"):
            results[f"{case.name} {backend}"] = run(case, backend)
    results["decoding"] = {"inexact": count_inexact_decodings()}
    others = {
        "held": count_held(),
        "refused": find_refused_indices(),
        "sorted": [sort_many(dtype) for dtype in (torch.int32, torch.int64)],
    }
    print(json.dumps(results | others))


if __name__ == "__main__":
    main()
