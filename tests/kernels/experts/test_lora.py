"""Experts with adapters on a CPU: torch's backend against fp64, plain and checkpointed, the
interpreted kernels, and argument checks. tests/gpu covers the compiled kernels."""

import math
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sparselong.kernels.expert_stack import ExpertStack, PackedWeight
from sparselong.kernels.experts import op as experts_op
from sparselong.kernels.experts.lora import NO_ADAPTERS, Adapter, Adapters
from sparselong.kernels.experts.op import expert_mlp
from sparselong.runtime.recompute import checkpoint_contexts
from tests.kernels.run_interpreted import run_interpreted
from tests.references.expert_mlp import expert_mlp_reference

EXPERTS, HIDDEN, INNER, RANK, TOKENS, TOP_K = 5, 64, 96, 3, 37, 3
SCALINGS = (0.5, 2.0)


def draw() -> dict:
    """Return fp64 leaves by name (x, weights, biases, both projections' A and B), indices and the
    stack."""
    torch.manual_seed(0)
    picks = [torch.randperm(EXPERTS - 1)[:TOP_K] for _ in range(TOKENS)]  # the last gets no rows
    leaves = {
        "x": torch.randn(TOKENS, HIDDEN, dtype=torch.float64) * 3,
        "weights": torch.rand(TOKENS, TOP_K, dtype=torch.float64),
    }
    weights = []
    for name, out, width in (("gate_up", 2 * INNER, HIDDEN), ("down", HIDDEN, INNER)):
        leaves[f"{name}_a"] = torch.randn(EXPERTS, RANK, width, dtype=torch.float64) / 8
        # PEFT's layout: [out, r, experts], viewed per expert.
        laid_out = torch.randn(out, RANK, EXPERTS, dtype=torch.float64)
        leaves[f"{name}_b"] = laid_out.permute(2, 0, 1)
        shape = (EXPERTS, out, width // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        scales = torch.randint(120, 126, shape, dtype=torch.uint8)
        leaves[f"{name}_bias"] = torch.randn(EXPERTS, out, dtype=torch.float64)
        weights.append(PackedWeight(blocks, scales, leaves[f"{name}_bias"]))
    leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items()}
    return {"leaves": leaves, "indices": torch.stack(picks), "stack": ExpertStack(*weights)}


def adapters_of(leaves: dict, which: tuple[str, ...]) -> Adapters:
    return Adapters(
        *(
            Adapter(leaves[f"{name}_a"], leaves[f"{name}_b"], scaling) if name in which else None
            for name, scaling in zip(("gate_up", "down"), SCALINGS, strict=True)
        )
    )


def ours(case: dict, which: tuple[str, ...], x: torch.Tensor) -> torch.Tensor:
    leaves = case["leaves"]
    adapters = adapters_of(leaves, which)
    return expert_mlp(x, case["indices"], leaves["weights"], case["stack"], adapters)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("which", [("gate_up",), ("down",), ("gate_up", "down")], ids="+".join)
def test_output_and_gradients_match_the_reference(which, checkpointed):
    case = draw()
    factors = [f"{name}_{part}" for name in which for part in "ab"]
    used = ["x", "weights", "gate_up_bias", "down_bias", *factors]
    leaves = [case["leaves"][name] for name in used]
    exact = expert_mlp_reference(
        case["leaves"]["x"], case["indices"], case["leaves"]["weights"], case["stack"],
        adapters_of(case["leaves"], which),
    )  # fmt: skip
    run = partial(ours, case, which)
    if checkpointed:
        contexts = partial(checkpoint_contexts, True)
        run = partial(checkpoint, run, use_reentrant=False, context_fn=contexts)
    out = run(case["leaves"]["x"])
    upstream = torch.randn_like(exact)
    wanted = torch.autograd.grad(exact, leaves, upstream)
    got = torch.autograd.grad(out, leaves, upstream)
    for name, one, want in zip(("out", *used), (out, *got), (exact, *wanted), strict=True):
        assert (one - want).norm() <= 1e-12 * want.norm(), name
    for name, grad in zip(factors, got[4:], strict=True):
        assert not grad[-1].any(), f"{name}: an expert without rows has a gradient"


@pytest.mark.parametrize("which", [("gate_up",), ("down",), ("gate_up", "down")], ids="+".join)
def test_a_zero_adapter_changes_no_bit_of_output_or_other_gradients(which):
    case = draw()
    leaves = case["leaves"]
    with torch.no_grad():
        for name in which:
            leaves[f"{name}_b"].zero_()
    others = [leaves[name] for name in ("x", "weights", "gate_up_bias", "down_bias")]
    plain, adapted = ours(case, (), leaves["x"]), ours(case, which, leaves["x"])
    upstream = torch.randn_like(plain)
    assert torch.equal(plain, adapted)
    wanted, got = (torch.autograd.grad(out, others, upstream) for out in (plain, adapted))
    assert all(map(torch.equal, got, wanted))


def test_absent_adapters_equal_no_adapters_argument():
    case = draw()
    call = (case["leaves"]["x"], case["indices"], case["leaves"]["weights"], case["stack"])
    assert NO_ADAPTERS.are_absent and NO_ADAPTERS == Adapters(None, None)
    assert torch.equal(expert_mlp(*call), ours(case, (), call[0]))
    assert not adapters_of(case["leaves"], ("down",)).are_absent


def test_no_tokens_give_no_output():
    case = draw()
    call = (case["leaves"]["x"][:0], case["indices"][:0], case["leaves"]["weights"][:0])
    adapters = adapters_of(case["leaves"], ("gate_up",))
    assert expert_mlp(*call, case["stack"], adapters).shape == (0, HIDDEN)


def test_generation_backend_refuses_adapters(monkeypatch):
    """The table falls back to the small tiles; naming the generation backend raises."""
    case, seen = draw(), []
    call = (case["leaves"]["x"][:2].bfloat16(), case["indices"][:2], case["leaves"]["weights"][:2])
    adapters = adapters_of(case["leaves"], ("down",))
    monkeypatch.setattr(experts_op, "choose", lambda *_: "generation")
    monkeypatch.setattr(experts_op, "_infer", lambda _, operands, __: seen.append(operands.backend))
    with torch.no_grad():
        expert_mlp(*call, case["stack"], adapters)
        assert seen == ["small"]
        with pytest.raises(ValueError, match="generation with 6 routed tokens.*adapters present"):
            expert_mlp(*call, case["stack"], adapters, backend="generation")


def test_interpreted_kernels_agree_with_fp64(forked_python):
    results = run_interpreted(forked_python, "interpreted_expert_lora")
    assert len(results) == 6
    for name, errors in results.items():
        for result, error in errors.items():
            assert error < 1e-6, f"{name}: {result} is off by {error:.1e}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a._replace(a=a.a[:4]), r"adapters.gate_up.a: .* \[4, 3, 64\].*\[5, 3, 64\]"),
        (lambda a: a._replace(b=a.b.mT), r"adapters.gate_up.b: .* \[5, 3, 192\].*\[5, 192, 3\]"),
        (lambda a: a._replace(b=a.b.int()), "adapters.gate_up.b: torch.int32"),
        (lambda a: a._replace(a=a.a[:, :0], b=a.b[..., :0]), r"adapters.gate_up.a: .* r > 0"),
        (lambda a: a._replace(b=a.b.detach().to("meta")), "adapters.gate_up.b: .* on meta"),
        (lambda a: a._replace(scaling=math.nan), "adapters.gate_up.scaling: nan; allowed: finite"),
    ],
)
def test_bad_adapters_are_named(change, message):
    case = draw()
    leaves = case["leaves"]
    adapters = Adapters(gate_up=change(adapters_of(leaves, ("gate_up",)).gate_up))
    with pytest.raises(ValueError, match=message):
        expert_mlp(leaves["x"], case["indices"], leaves["weights"], case["stack"], adapters)


def test_a_bad_down_adapter_is_named():
    case = draw()
    adapters = Adapters(down=adapters_of(case["leaves"], ("gate_up",)).gate_up)
    with pytest.raises(ValueError, match=r"adapters.down.a: .* \[5, 3, 64\].*\[5, 3, 96\]"):
        expert_mlp(
            case["leaves"]["x"], case["indices"], case["leaves"]["weights"], case["stack"], adapters
        )
