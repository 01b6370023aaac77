"""Expert benchmark: errors of arms with adapters, and packages that are not installed."""

import importlib

import pytest
import torch

from benchmarks import expert_gemm, expert_lora_arms
from benchmarks.report import notes as report
from sparselong.kernels import ExpertStack, PackedWeight

EXPERTS, WIDTH, TOKENS = 4, 64, 24


@pytest.fixture
def stack():
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)

    return ExpertStack(
        *(
            PackedWeight(
                draw(0, 256, EXPERTS, out, WIDTH // 32, 16),
                draw(116, 121, EXPERTS, out, WIDTH // 32),
                torch.randn(EXPERTS, out, generator=generator).bfloat16(),
            )
            for out in (2 * WIDTH, WIDTH)
        )
    )


def draw_call() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    x, dout = (torch.randn(TOKENS, WIDTH).bfloat16() for _ in range(2))
    weights = torch.rand(TOKENS, 2).softmax(1).bfloat16().requires_grad_()
    indices = torch.rand(TOKENS, EXPERTS).topk(2).indices
    x.requires_grad_()
    return {"x": x, "expert_indices": indices, "routing_weights": weights, "dout": dout}


def test_errors_include_those_of_the_factors(stack):
    call = draw_call()
    exact_call = call | {n: call[n].detach().double().requires_grad_() for n in expert_gemm.LEAVES}
    exact_call["dout"] = call["dout"].double()
    both = expert_gemm.forward_backward
    exact = both(expert_gemm.make_adapted_reference(stack), exact_call)
    factors = expert_lora_arms.draw_factors(stack)
    run = expert_lora_arms.make_lora(stack, factors, "torch")
    errors = expert_gemm.find_errors(both, run, call, exact)
    assert len(errors) == 1 + len(expert_gemm.GRADIENTS) and max(errors) < 0.02
    factors[3] = factors[3].roll(1, 0)  # other experts' B of down
    wrong = expert_lora_arms.make_lora(stack, factors, "torch")
    assert expert_gemm.find_errors(both, wrong, call, exact)[0] > 0.1


def test_packages_that_cannot_be_imported_are_recorded_with_the_reason(stack, monkeypatch):
    def refuse(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", refuse)
    runs, rows = expert_lora_arms.make_lora_runs(stack)
    assert set(runs) == {"lora_chosen"}
    assert [row["backend"] for row in rows] == list(expert_lora_arms.PACKAGES)
    assert "No module named 'mxfp4_qlora'" in rows[1]["case"]["reason"]
    notes = report.list_notes(rows)
    assert len(notes) == 2 and "`lora_nf4_gemm` was not measured" in notes[1]


def test_adapters_are_not_timed_for_decoding(stack):
    runs = {"lora_chosen": expert_lora_arms.make_lora(stack, [], None)}
    assert expert_gemm.select(dict(runs), 8) == {}
    assert set(expert_gemm.select(dict(runs), 1024)) == {"lora_chosen"}
