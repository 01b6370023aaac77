"""Held experts' passes on a CPU: torch's backend and the interpreted kernels against fp64, parts
that add up to the whole layer, and argument checks. tests/gpu covers the compiled kernels."""

from typing import Any

import pytest
import torch

from sparselong.kernels.experts import (
    ExpertCall,
    Gradients,
    choose_held,
    differentiate_held,
    expert_mlp,
    run_held,
    sum_parts,
    torch_backend,
)
from sparselong.kernels.experts import held as held_experts
from tests.kernels.held_experts import (
    CASES,
    Case,
    differentiated,
    draw,
    measure,
    names_of,
    run,
    take,
)
from tests.kernels.run_interpreted import run_interpreted

WHOLE = [case for case in CASES if not case.empty]  # expert_mlp takes no index of -1
HELD = range(2, 5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_part_matches_the_reference(case, monkeypatch):
    monkeypatch.setattr(held_experts, "WINDOW_ROWS", case.window_rows)
    for name, error in measure(case, torch.float64, "torch").items():
        assert error < 1e-12, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("case", WHOLE, ids=lambda case: case.name)
def test_parts_add_up_to_the_whole_layer(case, monkeypatch):
    monkeypatch.setattr(held_experts, "WINDOW_ROWS", case.window_rows)
    layer = draw(case, torch.float64)
    x, indices, weights = layer.call
    leaves = [x.requires_grad_(), weights.requires_grad_()]
    leaves += [factor.requires_grad_() for factor in layer.adapters.factors if factor is not None]
    out = expert_mlp(x, indices, weights, layer.stack, layer.adapters)
    whole = (out, *torch.autograd.grad(out, leaves, layer.dout))
    parts = [run(layer, held, "torch") for held in case.parts]
    for name, want in zip(names_of(layer), whole, strict=True):
        every = [part[name] for part in parts]
        got = sum(every) if name in ("out", "x", "weights") else torch.cat(every)
        assert (got - want).norm() <= 1e-12 * want.norm(), name


def test_memory_of_the_torch_backend_is_bounded_too(monkeypatch):
    monkeypatch.setattr(held_experts, "WINDOW_ROWS", 48)
    layer, sizes = draw(Case("all_on_one_expert", 70, top_k=1, only=(3,)), torch.float32), []
    compute = torch_backend.sum_held_torch

    def watch(call: ExpertCall, *args: Any) -> torch.Tensor:
        sizes.append(len(call.x))
        return compute(call, *args)

    for module in (held_experts, torch_backend):  # forward, backward
        monkeypatch.setattr(module, "sum_held_torch", watch)
    run(layer, HELD, "torch")
    assert sizes == [35, 35, 35, 35]


def test_sums_are_fp32_for_bf16_rows():
    layer = draw(Case("bf16", 37), torch.bfloat16)
    got, exact = run(layer, HELD, "torch"), measure(Case("bf16", 37), torch.bfloat16, "torch")
    assert got["out"].dtype == got["weights"].dtype == torch.bfloat16
    assert got["down_b"].dtype == torch.float32
    assert max(exact.values()) < 2e-2


def test_gradients_that_are_not_needed_are_left_out():
    layer = draw(Case("some", 9), torch.float64)
    operands, sums = take(layer, HELD, "torch"), take(layer, HELD, "torch").adapters.make_sums()
    gradients = Gradients(None, None, adapters=sums)
    differentiate_held(*differentiated(layer), operands, HELD, gradients, experts=5, rows=None)
    every = run(layer, HELD, "torch")
    assert sums.down is not None
    torch.testing.assert_close(sums.down.b, every["down_b"], rtol=1e-9, atol=1e-9)


def test_no_rows_are_no_work():
    layer = draw(Case("no_rows", 2), torch.float64)
    layer.call, layer.dout = layer.call.part(slice(0, 0)), layer.dout[:0]
    results = run(layer, HELD, "torch")
    assert results["out"].shape == (0, 64) and not results["gate_up_a"].any()


@pytest.fixture(scope="module")
def interpreted(forked_python) -> dict[str, Any]:
    """Return the kernels' errors in Triton's interpreter, by case and backend."""
    return run_interpreted(forked_python, "interpreted_held_experts")


def test_interpreted_kernels_agree_with_fp64(interpreted):
    others = ("work", "refused", "parts", "rounded")
    cases = {name: errors for name, errors in interpreted.items() if name not in others}
    assert len(cases) == sum(len(case.interpreted) for case in CASES)
    for name, errors in cases.items():
        for result, error in errors.items():
            assert error < 1e-6, f"{name}: {result} is off by {error:.1e}"


def test_windows_do_the_work_of_their_rows_and_end_with_the_last(interpreted):
    assert interpreted["work"] == {"gather": [16, 8], "gate": [16, 8], "decode": [2, 2]}


def test_indices_outside_the_layer_fail_an_assertion(interpreted):
    assert interpreted["refused"] == [-3, -2, 5, 6, 7]


def test_interpreted_exact_parts_are_rounded_as_the_whole_layer(interpreted):
    assert interpreted["rounded"] == [0, 0, 0]


def test_interpreted_parts_are_added_in_order(interpreted):
    assert interpreted["parts"] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held": range(2, 4)}, r"held: range\(2, 4\); allowed: as many as the stack's 3"),
        ({"held": range(3, 6)}, "held: .*; allowed: consecutive experts of the layer's 5"),
        ({"held": range(-1, 2)}, "held: .*; allowed: consecutive experts of the layer's 5"),
        ({"held": range(0, 5, 2)}, "held: .*; allowed: consecutive experts of the layer's 5"),
        ({"backend": "generation"}, "backend: 'generation'; allowed: torch, small, packed, decode"),
        ({"backend": "fast"}, "backend: 'fast'; allowed: torch, small, packed, decode"),
        ({"index": -2}, "expert_indices: holds -2; allowed: -1 to 4"),
        ({"index": 5}, "expert_indices: holds 5; allowed: -1 to 4"),
        ({"experts": 2, "held": range(3)}, "3 experts per token; allowed: 1 to the layer's 2"),
    ],
)
def test_bad_calls_are_named(change, message):
    layer = draw(Case("bad", 9), torch.float64)
    operands = take(layer, HELD, change.get("backend", "torch"))
    layer.call.indices[3, 1] = change.get("index", 0)
    held, experts = change.get("held", HELD), change.get("experts", 5)
    with pytest.raises(ValueError, match=message):
        run_held(layer.call, operands, held, torch.empty_like(layer.dout), experts=experts)
    gradients = Gradients(None, None, adapters=operands.adapters.make_sums())
    with pytest.raises(ValueError, match=message):
        differentiate_held(
            *differentiated(layer), operands, held, gradients, experts=experts, rows=None
        )


def test_gradients_of_biases_are_refused():
    layer = draw(Case("biases", 9), torch.float64)
    gradients = Gradients(None, None, (False, True))
    with pytest.raises(ValueError, match=r"gradients.biases: requested; allowed: none"):
        differentiate_held(
            *differentiated(layer),
            take(layer, HELD, "torch"),
            HELD,
            gradients,
            experts=5,
            rows=None,
        )


def test_the_backend_is_the_whole_layers(monkeypatch):
    """A held expert's expected rows are those of any expert; generation has no held form."""
    layer = draw(Case("choice", 9), torch.float32)
    assert choose_held(layer.call.x, layer.call.indices.numel(), 5) == "torch"
    given = []
    for name, chosen in (("generation", "small"), ("decode", "decode")):
        monkeypatch.setattr(
            held_experts, "choose", lambda *args, name=name: given.append(args) or name
        )
        assert choose_held(layer.call.x, layer.call.indices.numel(), 5) == chosen
        assert given[-1][2:] == (5, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_parts_are_rounded_once(dtype):
    torch.manual_seed(0)
    parts = torch.randn(5, 7, 33, dtype=torch.float64).to(dtype)
    out = torch.full((7, 33), torch.nan, dtype=dtype)
    sum_parts(parts, out)
    total = torch.zeros(7, 33, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for part in parts:
        total = total + part
    assert torch.equal(out, total.to(dtype))


def test_exact_parts_are_added_in_fp64():
    """1 is lost beside 2^40 in fp32, whatever the order."""
    parts = torch.tensor([2.0**40, 1.0, -(2.0**40)], dtype=torch.float64)
    out = torch.empty(1, 1, dtype=torch.bfloat16)
    sum_parts(parts.view(3, 1, 1) * 2.0**-8, out)
    assert out.item() == 2.0**-8


def test_exact_parts_are_rounded_as_the_whole_layer():
    """Shares in bf16 would change every third value."""
    layer = draw(Case("rounded_as_the_whole", 70), torch.bfloat16)
    whole, parts = expert_mlp(*layer.call, layer.stack, layer.adapters), []
    for held in (range(2), range(2, 5)):
        parts.append(torch.full_like(whole, torch.nan, dtype=torch.float64))
        run_held(layer.call, take(layer, held, "torch"), held, parts[-1], experts=5)
    out = torch.empty_like(whole)
    sum_parts(torch.stack(parts), out)
    assert (out != whole).double().mean() < 1e-3  # torch's backend sums in fp32
    sum_parts(torch.stack(parts).bfloat16(), out)
    assert (out != whole).double().mean() > 0.1


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (torch.zeros(2, 3, 5), "parts: .*; allowed: "),
        (torch.zeros(0, 3, 4), "parts: .*; allowed: "),
        (
            torch.zeros(2, 3, 4).bfloat16(),
            "parts: torch.bfloat16 on cpu; allowed: out's torch.float32 or a wider dtype",
        ),
        (torch.zeros(3, 2, 4).transpose(0, 1), "parts, out: strided; allowed: contiguous"),
    ],
)
def test_bad_parts_are_named(parts, message):
    with pytest.raises(ValueError, match=message):
        sum_parts(parts, torch.zeros(3, 4))
