"""Runs operators of torch.compile's on kernels in Triton's interpreter; test_opaque.py starts it.

Prints one JSON document: by operator, how far results and gradients are from those of the function
that runs without a compiler, relative L2. Each operator is given to `torch.library.opcheck` first,
which compares its schema, shapes and strides with what it does.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import json
from collections.abc import Callable
from typing import Any

import numpy
import torch

from sparselong.kernels.attention import passes
from sparselong.kernels.attention.op import load_backend
from sparselong.kernels.expert_stack import ExpertStack, Gate, PackedWeight
from sparselong.kernels.experts import in_graph
from sparselong.kernels.experts.call import ExpertCall, ExpertOperands
from sparselong.kernels.experts.lora import Adapter, Adapters
from sparselong.kernels.experts.op import _ExpertPass
from sparselong.kernels.layer import norm, rotary, router
from tests.kernels.interpreter import patch_once

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def leaf(given: Any) -> Any:
    """Return an argument with its tensors detached, requiring gradients as before."""
    if isinstance(given, list):
        return [leaf(each) for each in given]
    if isinstance(given, torch.Tensor):
        return given.detach().requires_grad_(given.requires_grad)
    return given


def compare(operator: Any, direct: Callable[..., Any], *arguments: Any) -> list[float]:
    """Return errors of results and gradients; `direct` returns the operator's first results."""
    check: Any = torch.library.opcheck
    check(operator, arguments, test_utils=CHECKS)
    found = []
    for run in (direct, operator):
        torch.manual_seed(1)
        given = [leaf(each) for each in arguments]
        results = run(*given)[: len(found[0][0]) if found else None]
        flat = [t for each in given for t in (each if isinstance(each, list) else [each])]
        leaves = [t for t in flat if isinstance(t, torch.Tensor) and t.requires_grad]
        upstream = [torch.randn(result.shape) for result in results]
        found.append((results, torch.autograd.grad(results, leaves, upstream)))
    pairs = zip(*((*results, *gradients) for results, gradients in found), strict=True)
    return [float((got - wanted).detach().norm() / wanted.detach().norm()) for wanted, got in pairs]


def draw(*size: int) -> torch.Tensor:
    return torch.randn(size).requires_grad_()


def run_norm() -> list[float]:
    direct = lambda x, w, eps: norm.RMSNormFunction.apply(x, None, w, eps)[:1]  # noqa: E731
    return compare(norm._rms_norm_operator, direct, draw(2, 5, 96), draw(96), 1e-5)


def run_rotate() -> list[float]:
    q, k = (torch.randn(2, 5, heads, 32).transpose(1, 2).requires_grad_() for heads in (4, 2))
    cos, sin = torch.randn(2, 1, 16, 5).mT
    return compare(rotary._rotate_operator, rotary.RotateFunction.apply, q, k, cos, sin)


def run_router() -> list[float]:
    def direct(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, top_k: int, _: bool):
        return router._Route.apply(x, router.Router(weight, bias, top_k))[1:2]

    weight, bias = torch.randn(8, 64), torch.randn(8)
    return compare(router._route_operator, direct, draw(5, 64), weight, bias, 2, True)


def run_experts() -> list[float]:
    """With both adapters and trained biases, on the GPU's path."""
    in_graph.is_on_gpu = lambda x: True
    in_graph.choose = lambda *_: "packed"

    def direct(x, indices, weights, packed, factors, first, second, gate, _):
        one, two = (Adapter(*factors[n : n + 2], s) for n, s in ((0, first), (2, second)))
        stack = ExpertStack(PackedWeight(*packed[:3]), PackedWeight(*packed[3:]))
        operands = ExpertOperands(stack, Adapters(one, two), Gate(*gate), "packed")
        call = ExpertCall(x, indices, weights)
        return (_ExpertPass.apply(operands, None, *call, *operands.trainable),)

    experts, hidden, inner, rank = 3, 64, 32, 4
    packed = []
    for out, width in ((2 * inner, hidden), (hidden, inner)):
        packed.append(torch.randint(0, 256, (experts, out, width // 32, 16), dtype=torch.uint8))
        packed.append(torch.randint(119, 123, (experts, out, width // 32), dtype=torch.uint8))
        packed.append(draw(experts, out))
    factors = [draw(experts, rank, hidden), draw(experts, 2 * inner, rank)]
    factors += [draw(experts, rank, inner), draw(experts, hidden, rank)]
    routing = torch.randn(7, experts).topk(2).indices, draw(7, 2)
    constants = (0.5, 2.0, [1.702, 7.0], True)
    return compare(in_graph._experts_operator, direct, draw(7, hidden), *routing, packed, factors,
                   *constants)  # fmt: skip


def run_attention() -> list[float]:
    """The two functions that the operator calls, on the Triton backend, against plain torch."""
    q, k, v = (torch.randn(1, 40, heads, 64).transpose(1, 2) for heads in (4, 2, 2))
    sinks, dout = torch.randn(4), torch.randn(1, 40, 4, 64).transpose(1, 2)
    kind: dict[str, Any] = {"window": 16, "scale": None}
    kind["cu_seqlens"] = torch.tensor([0, 13, 40], dtype=torch.int32)
    found = []
    for name in ("torch", "triton"):
        passes.pick_backend = lambda *_, name=name: name
        choice = passes.Choice(None, True, True)
        out, lse, decided = passes.run_forward(q, k, v, sinks, **kind, choice=choice)
        assert out.stride() == q.stride() and decided.tolist()[1] == 1
        saved = passes.SavedForward(q, k, v, sinks, out, lse)
        gradients = passes.run_backward(dout, saved, decided, **kind, needs_dsinks=True)
        found.append((out, lse, *gradients))
    return [float((got - want).norm() / want.norm()) for want, got in zip(*found, strict=True)]


def main() -> None:
    patch_once()
    numpy.seterr(all="ignore")
    torch.manual_seed(0)
    load_backend.cache_clear()
    runs = (run_norm, run_rotate, run_router, run_experts, run_attention)
    print(json.dumps({run.__name__.removeprefix("run_"): run() for run in runs}))


if __name__ == "__main__":
    main()
