"""Joint projections of queries, keys and values on a GPU: outputs and every gradient."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sparselong.runtime import checkpoint_contexts
from tests.kernels.masked_weight_interpreted import Case, draw, unpack_gate
from tests.references.rotary import rotate_reference

pytest.importorskip("peft")

from sparselong.adapters.joined import JoinedProjections

DIM, TOKENS, COLUMNS = 32, 50, 96
CASES = [Case(bits, sparse, 8, 64, COLUMNS, layers=3, more=64) for bits, sparse in
         ((4, True), (8, False), (16, False))]  # fmt: skip


def make_layers(case: Case) -> list[SimpleNamespace]:
    """Return what the joint layer reads of three masked LoRA layers."""
    drawn, layers, start = draw(case, "cuda"), [], 0
    for a, b in drawn.pairs:
        rows = slice(start, start + len(b))
        start += len(b)
        factors = a.requires_grad_(), b.requires_grad_()
        layers.append(
            SimpleNamespace(
                master=drawn.master[rows],
                patterns=None if drawn.patterns is None else drawn.patterns[rows],
                scale=None if drawn.scale is None else drawn.scale[rows],
                bits=case.bits,
                base_layer=SimpleNamespace(bias=torch.randn(len(b), device="cuda")),
                disable_adapters=False,
                adapter=lambda factors=factors: (*factors, 0.5),
            )
        )
    return layers


def differentiate(project, leaves, upstream) -> list[torch.Tensor]:
    outputs = project(leaves[0])
    given = [up.to(out.dtype) for up, out in zip(upstream, outputs, strict=True)]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, given)]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients(case, dtype, limit, checkpointed):
    """Against fp64 with the kernel's own weight and gate, which test_masked_weight.py checks."""
    torch.manual_seed(0)
    joined = JoinedProjections(make_layers(case), DIM)
    x = torch.randn(2, TOKENS, COLUMNS, device="cuda").to(dtype).requires_grad_()
    cos, sin = torch.randn(2, 1, DIM // 2, TOKENS, device="cuda").to(dtype).mT
    upstream = [torch.randn(2, n // DIM, TOKENS, DIM, device="cuda") for n in joined.sizes]
    upstream = [up.to(dtype) for up in upstream]

    def run(hidden: torch.Tensor):
        if not checkpointed:
            return joined(hidden, cos, sin)
        context = partial(checkpoint_contexts, False)
        return checkpoint(joined, hidden, cos, sin, use_reentrant=False, context_fn=context)

    results, repeated = (differentiate(run, [x, *joined.factors], upstream) for _ in "12")
    weight, words = joined.weight().round_with_gate()
    passing = torch.ones_like(weight) if words is None else unpack_gate(words)
    leaves = [t.detach().double().requires_grad_() for t in (x, *joined.factors)]

    def exact(hidden: torch.Tensor):
        pairs = zip(leaves[1::2], leaves[2::2], strict=True)
        change = 0.5 * torch.cat([b @ a for a, b in pairs]) * passing
        total = weight.double() + change - change.detach()
        q, k, v = joined.split(hidden @ total.T + joined.bias.to(dtype).double())
        return *rotate_reference(q, k, cos.double(), sin.double()), v

    expected = differentiate(exact, leaves, upstream)
    for place, (got, again, true) in enumerate(zip(results, repeated, expected, strict=True)):
        assert torch.equal(got, again), place
        assert got.shape == true.shape and (got - true).norm() <= limit * true.norm(), place
