"""Experts with adapters on a GPU: output and gradients of every backend against fp64.

The bound and the odd shapes are those of the tests without adapters: at most twice the error of
plain torch in bf16 on the same inputs. Memory that kernels must fill is filled with NaN first.
"""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sparselong.kernels.experts import lora_triton as expert_lora_kernels
from sparselong.kernels.experts import op as experts_op
from sparselong.kernels.experts import routing as expert_routing
from sparselong.kernels.experts import triton_launch
from sparselong.kernels.experts.lora import Adapter, Adapters
from sparselong.kernels.experts.op import expert_mlp
from sparselong.runtime.recompute import checkpoint_contexts
from tests.gpu.test_experts import (
    CALL,
    CASES,
    OURS,
    Case,
    apply,
    assert_close,
    deviations,
    draw,
    stack_of,
)
from tests.poisoned import PoisonedTorch
from tests.references.expert_mlp import expert_mlp_reference

SCALINGS = {"gate_up": 4.0, "down": 0.5}
BOTH = ("gate_up", "down")


def draw_adapted(case: Case, rank: int = 8, which=BOTH, dtype=torch.bfloat16) -> dict:
    """Draw a call without adapters, and fp32 factors near A's initial values, B in PEFT layout."""
    call = draw(case, dtype)
    sizes = {"gate_up": (2 * case.inner, case.hidden), "down": (case.hidden, case.inner)}
    for name in which:
        out, width = sizes[name]
        a = torch.randn(case.experts * rank, width, device="cuda") / width**0.5
        b = torch.randn(out, rank * case.experts, device="cuda") / rank**0.5
        call[f"{name}_a"] = a.view(case.experts, rank, width)
        call[f"{name}_b"] = b.view(out, rank, case.experts).permute(2, 0, 1)
    return call


def names_of(call: dict) -> list[str]:
    """Return the trained names; biases, which prevent slices, only if they require gradients."""
    factors = [f"{name}_{part}" for name in BOTH for part in "ab" if f"{name}_a" in call]
    biases = [f"{name}_bias" for name in BOTH if call[f"{name}_bias"].requires_grad]
    return ["x", "routing_weights", *factors, *biases]


def adapters_of(leaves: dict) -> Adapters:
    return Adapters(
        *(
            Adapter(leaves[f"{name}_a"], leaves[f"{name}_b"], SCALINGS[name])
            if f"{name}_a" in leaves
            else None
            for name in BOTH
        )
    )


def run(call: dict, backend: str | None, keep=lambda f, *x: f(*x)) -> dict[str, torch.Tensor]:
    """Return output and gradients of the public function; `keep` may checkpoint it."""
    leaves = {name: call[name].detach().requires_grad_() for name in names_of(call)}
    given = call | leaves

    def layer(x):
        inputs = (x, *(given[name] for name in CALL[1:]))
        return expert_mlp(*inputs, stack_of(given), adapters_of(leaves), backend=backend)

    out = keep(layer, leaves["x"])
    grads = torch.autograd.grad(out, list(leaves.values()), call["dout"])
    return dict(zip(("out", *leaves), (out, *grads), strict=True))


def run_exactly(call: dict) -> dict[str, torch.Tensor]:
    """Return the same results from the fp64 reference."""
    leaves = {name: call[name].detach().double().requires_grad_() for name in names_of(call)}
    given = call | leaves
    inputs = (given[name] for name in CALL)
    out = expert_mlp_reference(*inputs, stack_of(given), adapters_of(leaves))
    grads = torch.autograd.grad(out, list(leaves.values()), call["dout"].double())
    return dict(zip(("out", *leaves), (out, *grads), strict=True))


def checkpointed(function, *inputs, keep_experts=False):
    contexts = partial(checkpoint_contexts, True, keep_experts)
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts)


@pytest.fixture
def poison(monkeypatch):
    """Make the launchers' torch.empty and torch.empty_like return NaN, or 77 for integers."""
    for module in (triton_launch, expert_routing, expert_lora_kernels):
        monkeypatch.setattr(module, "torch", PoisonedTorch())


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_err_no_more_than_twice_plain_torch(case, backend, poison, monkeypatch):
    if case.buffer_bytes is not None:
        monkeypatch.setattr(triton_launch, "BUFFER_BYTES", case.buffer_bytes)
    call = draw_adapted(case)
    assert_close(case.name, run(call, backend), run(call, "torch"), run_exactly(call))


@pytest.mark.parametrize("rank", [1, 3, 16, 64])
@pytest.mark.parametrize("which", [("gate_up",), ("down",), BOTH], ids="+".join)
def test_every_rank_and_target(rank, which, poison):
    call = draw_adapted(Case("ranks", 700), rank, which)
    assert_close(f"r{rank}", run(call, "packed"), run(call, "torch"), run_exactly(call))


@pytest.mark.parametrize("backend", ["packed", "decode"])
def test_slices_of_a_checkpointed_layer_have_the_same_gradients(backend, poison, monkeypatch):
    """Slices accumulate the gradients of A and B in order; the last slice is shorter."""
    monkeypatch.setattr(experts_op, "SLICE_TOKENS", 300)
    call = draw_adapted(Case("slices", 1000))
    got = run(call, backend, checkpointed)
    assert_close("slices", got, run(call, "torch"), run_exactly(call))
    again = run(call, backend, checkpointed)
    kept = run(call, backend, partial(checkpointed, keep_experts=True))
    assert all(torch.equal(got[name], again[name]) for name in got)
    assert all(torch.equal(got[name], kept[name]) for name in got)


@pytest.mark.parametrize("backend", OURS)
def test_fp32_is_accurate_to_fp32(backend, poison):
    call = draw_adapted(Case("fp32", 100, hidden=96, inner=160), 5, dtype=torch.float32)
    exact, got = run_exactly(call), run(call, backend)
    for name, want in exact.items():
        assert deviations(got[name], want)[1] < 2e-6, name


@pytest.mark.parametrize("backend", [*OURS, None])
def test_repeated_runs_are_bit_identical(backend):
    call = draw_adapted(Case("repeat", 700, experts=16))
    first = run(call, backend)
    for _ in range(3):
        again = run(call, backend)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_an_untrained_adapter_changes_no_bit():
    call = draw_adapted(Case("untrained", 500))
    for name in BOTH:
        call[f"{name}_b"].zero_()
    assert torch.equal(run(call, "packed")["out"], apply(call, "packed"))


@pytest.mark.parametrize("keep", [None, checkpointed], ids=["plain", "checkpointed"])
def test_biases_are_trained_together_with_adapters(keep, poison):
    call = draw_adapted(Case("biases", 700))
    for name in BOTH:
        call[f"{name}_bias"].requires_grad_()
    got = run(call, "packed", *([keep] if keep else []))
    assert {"gate_up_bias", "down_bias"} < set(got)
    assert_close("biases", got, run(call, "torch"), run_exactly(call))


def test_without_gradients_the_output_is_the_same():
    call = draw_adapted(Case("inference", 700))
    with torch.no_grad():
        inputs = (call[name] for name in CALL)
        out = expert_mlp(*inputs, stack_of(call), adapters_of(call), backend="packed")
    assert torch.equal(out, run(call, "packed")["out"])


def test_no_delta_of_weight_size_is_allocated():
    """One gate_up delta for 32 experts of gpt-oss's widths would take 1 GiB in bf16."""
    case = Case("memory", 64, experts=32, top_k=4, hidden=2880, inner=2880)
    call = draw_adapted(case)
    factors = sum(call[name].numel() for name in call if name[-2:] in ("_a", "_b"))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(call, "packed")
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < (2 + 4 + 4) * factors + 32 * 64 * 4 * 2880 * 2
