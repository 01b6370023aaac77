"""Runs passes over held experts in Triton's interpreter; experts/test_held.py starts it.

Runs in its own process, because the interpreter must be chosen before Triton is imported. Prints
one JSON document: for each case the relative L2 errors against fp64, NaN if a result contains NaN.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import json

import torch
from triton.runtime.errors import InterpreterError

from sparselong.kernels.experts import held as held_experts
from sparselong.kernels.experts import lora_triton, routing, triton_launch, triton_parts
from sparselong.kernels.experts.routing import HeldRows
from tests.kernels.held_experts import CASES, GATE, Case, draw, measure, take
from tests.kernels.interpreter import patch_once
from tests.poisoned import PoisonedTorch


def find_refused_indices() -> list[int]:
    """Return which indices the sort refuses in a layer of five experts."""
    refused = []
    for index in range(-3, 8):
        indices = torch.full((3, 2), 1)
        indices[2, 1] = index
        try:
            HeldRows(indices, range(1, 3), 5, 32, 4)
        except InterpreterError:
            refused.append(index)
    return refused


def count_work() -> dict[str, list[int]]:
    """Count the rows (experts) that kernels write in windows: full and half full; 24 of 48 rows."""
    indices = torch.full((48, 1), 4)
    indices[:24] = 1
    x, weight = torch.randn(48, 64), draw(CASES[0], torch.float32).stack.gate_up
    weight = weight._replace(**{k: v[1:3] for k, v in weight._asdict().items()})
    work: dict[str, list[int]] = {"gather": [], "gate": [], "decode": []}
    for window in HeldRows(indices, range(1, 3), 5, 32, 16).windows():
        gathered, _ = routing.gather(x, window, indices)
        h = triton_launch.apply_gate(torch.ones(16, 64), window, GATE)
        buffer = torch.full((2, 64, 64), torch.nan)
        triton_launch.decode_into(buffer, weight, 0, 2, window)
        for name, values in (("gather", gathered), ("gate", h), ("decode", buffer)):
            work[name].append(int(values.isfinite().sum()) // values[0].numel())
    return work


def rounded_parts(backend: str) -> int:
    """Return how many values of the sum of exact parts are not the whole layer's bits."""
    layer = draw(Case("rounded", 37, ends=(1, 3)), torch.float32)
    out, whole = torch.empty_like(layer.call.x), torch.empty_like(layer.call.x)
    operands = take(layer, range(3), backend)
    triton_launch.run_forward(layer.call, operands, whole, False, exact=True)
    parts = torch.full((2, *out.shape), torch.nan, dtype=torch.float64)
    for held, part in zip((range(1), range(1, 3)), parts, strict=True):
        held_experts.run_held(layer.call, take(layer, held, backend), held, part, experts=3)
    triton_parts.add_parts(parts, out)
    return int((out != whole).sum())


def sum_of_parts(parts: int, rows: int) -> float:
    """Return the largest deviation from the sum in order."""
    given = torch.randn(parts, rows, 33)
    out = torch.full((rows, 33), torch.nan)
    triton_parts.add_parts(given, out)
    total = given[0].clone()
    for part in given[1:]:
        total += part
    return (out - total).abs().max().item()


def main() -> None:
    patch_once()
    for module in (triton_launch, routing, lora_triton):
        module.torch = PoisonedTorch()  # pyright: ignore[reportAttributeAccessIssue]
    results = {}
    for case in CASES:
        held_experts.WINDOW_ROWS = case.window_rows
        for backend in case.interpreted:
            results[f"{case.name} {backend}"] = measure(case, torch.float32, backend)
    results["work"] = count_work()
    results["refused"] = find_refused_indices()
    held_experts.WINDOW_ROWS = 20
    results["rounded"] = [rounded_parts(backend) for backend in ("small", "packed", "decode")]
    results["parts"] = [sum_of_parts(*shape) for shape in ((1, 5), (2, 70), (5, 3))]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
