"""The experts' pass with adapters on a CPU: torch's backend against fp64, plain and checkpointed,
the kernels in Triton's interpreter, what is refused. tests/gpu has the kernels as compiled."""

import math
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sparselong.kernels.experts.lora import Adapter, expert_lora_mlp
from sparselong.kernels.experts.op import ALPHA, LIMIT, expert_mlp
from sparselong.runtime.recompute import checkpoint_contexts
from tests.kernels.run_interpreted import run_interpreted
from tests.references.expert_lora import expert_lora_reference

EXPERTS, HIDDEN, INNER, RANK, TOKENS, TOP_K = 5, 64, 96, 3, 37, 3
SCALINGS = (0.5, 2.0)


def draw() -> dict:
    """Leaves in fp64 by name (x, weights, A and B of both stacks), indices and the stacks."""
    torch.manual_seed(0)
    picks = [torch.randperm(EXPERTS - 1)[:TOP_K] for _ in range(TOKENS)]  # the last has no rows
    leaves = {
        "x": torch.randn(TOKENS, HIDDEN, dtype=torch.float64) * 3,
        "weights": torch.rand(TOKENS, TOP_K, dtype=torch.float64),
    }
    stacks = []
    for name, out, width in (("gate_up", 2 * INNER, HIDDEN), ("down", HIDDEN, INNER)):
        leaves[f"{name}_a"] = torch.randn(EXPERTS, RANK, width, dtype=torch.float64) / 8
        # PEFT's layout: [out, r, experts], seen by expert.
        laid_out = torch.randn(out, RANK, EXPERTS, dtype=torch.float64)
        leaves[f"{name}_b"] = laid_out.permute(2, 0, 1)
        shape = (EXPERTS, out, width // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        scales = torch.randint(120, 126, shape, dtype=torch.uint8)
        stacks.append((blocks, scales, torch.randn(EXPERTS, out, dtype=torch.float64)))
    leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items()}
    return {"leaves": leaves, "indices": torch.stack(picks), "stacks": stacks}


def adapters_of(leaves: dict, which: tuple[str, ...]) -> list:
    return [
        (leaves[f"{name}_a"], leaves[f"{name}_b"], scaling) if name in which else None
        for name, scaling in zip(("gate_up", "down"), SCALINGS, strict=True)
    ]


def ours(case: dict, which: tuple[str, ...], x: torch.Tensor) -> torch.Tensor:
    adapters = [one and Adapter(*one) for one in adapters_of(case["leaves"], which)]
    return expert_lora_mlp(
        x, case["indices"], case["leaves"]["weights"], *case["stacks"], *adapters
    )


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("which", [("gate_up",), ("down",), ("gate_up", "down")], ids="+".join)
def test_output_and_gradients_are_the_references(which, checkpointed):
    case = draw()
    used = ["x", "weights", *(f"{name}_{part}" for name in which for part in "ab")]
    leaves = [case["leaves"][name] for name in used]
    exact = expert_lora_reference(
        case["leaves"]["x"], case["indices"], case["leaves"]["weights"], *case["stacks"],
        *adapters_of(case["leaves"], which), ALPHA, LIMIT,
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
    for name, grad in zip(used[2:], got[2:], strict=True):
        assert not grad[-1].any(), f"{name}: an expert without rows has a gradient"


def test_an_untrained_adapter_changes_no_bit():
    case = draw()
    with torch.no_grad():
        for name in ("gate_up_b", "down_b"):
            case["leaves"][name].zero_()
        leaves = case["leaves"]
        plain = expert_mlp(
            leaves["x"], case["indices"], leaves["weights"], *case["stacks"][0], *case["stacks"][1]
        )
        assert torch.equal(ours(case, ("gate_up", "down"), leaves["x"]), plain)


def test_the_kernels_agree_with_fp64_in_the_interpreter():
    results = run_interpreted("interpreted_expert_lora")
    assert len(results) == 6
    for name, errors in results.items():
        for result, error in errors.items():
            assert error < 1e-6, f"{name}: {result} is off by {error:.1e}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: None, "gate_up_adapter, down_adapter: both None"),
        (lambda a: a._replace(a=a.a[:4]), r"gate_up_adapter.a: .* \[4, 3, 64\].*\[5, 3, 64\]"),
        (lambda a: a._replace(b=a.b.mT), r"gate_up_adapter.b: .* \[5, 3, 192\].*\[5, 192, 3\]"),
        (lambda a: a._replace(b=a.b.int()), "gate_up_adapter.b: torch.int32"),
        (lambda a: a._replace(a=a.a[:, :0], b=a.b[..., :0]), r"gate_up_adapter.a: .* r > 0"),
        (lambda a: a._replace(b=a.b.detach().to("meta")), "gate_up_adapter.b: .* on meta"),
        (lambda a: a._replace(scaling=math.nan), "gate_up_adapter.scaling: nan; allowed: finite"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    case = draw()
    leaves = case["leaves"]
    adapter = change(Adapter(*adapters_of(leaves, ("gate_up",))[0]))
    with pytest.raises(ValueError, match=message):
        expert_lora_mlp(
            leaves["x"], case["indices"], leaves["weights"], *case["stacks"], adapter, None
        )


def test_a_trained_bias_is_refused():
    case = draw()
    case["stacks"][1][2].requires_grad_()
    with pytest.raises(ValueError, match="down: its bias is trained"):
        ours(case, ("gate_up",), case["leaves"]["x"])
