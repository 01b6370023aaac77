"""Held experts' passes on a GPU: every backend against fp64, memory, reproducible bits.

The bound is that of the tests of whole layers: at most twice the error of plain torch in bf16 on
the same inputs. In a case with few rows it is luck how large plain torch's error is, so there the
RMS error may be that of two more roundings. Memory that kernels must fill is filled with NaN first.
"""

import dataclasses
import subprocess
import sys

import pytest
import torch

from sparselong.kernels.experts import (
    NO_ADAPTERS,
    ExpertCall,
    Gradients,
    choose_held,
    differentiate_held,
    expert_mlp,
    lora_triton,
    routing,
    run_held,
    sum_parts,
    triton_launch,
)
from sparselong.kernels.experts import held as held_experts
from tests.gpu.test_experts import OURS, assert_close, deviations
from tests.kernels.held_experts import (
    CASES,
    Case,
    Layer,
    differentiated,
    draw,
    run,
    run_exactly,
    take,
)
from tests.poisoned import PoisonedTorch

FEW_ROWS, ROUNDING = 100, torch.finfo(torch.bfloat16).eps / 2
LARGE = [
    Case("gpt_oss_widths", 300, ends=(2, 6), top_k=4, hidden=2880, inner=2880, window_rows=500),
    Case("widths_no_multiple_of_a_tile", 300, hidden=96, inner=160, window_rows=333),
    Case("many_windows", 1000, ends=(8, 16, 32), top_k=4, hidden=256, inner=256, window_rows=512),
    Case("many_padding_rows", 500, empty=tuple(range(100, 400)), hidden=256, inner=256),
]


@pytest.fixture
def poison(monkeypatch):
    """Make the launchers' torch.empty and torch.empty_like return NaN, or 77 for integers."""
    for module in (triton_launch, routing, lora_triton):
        monkeypatch.setattr(module, "torch", PoisonedTorch())


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=lambda case: case.name)
def test_kernels_err_no_more_than_twice_plain_torch(case, backend, poison, monkeypatch):
    monkeypatch.setattr(held_experts, "WINDOW_ROWS", case.window_rows)
    layer = draw(case, torch.bfloat16, "cuda")
    for held in case.parts:
        got, plain = run(layer, held, backend), run(layer, held, "torch")
        exact = run_exactly(layer, held)
        if case.rows >= FEW_ROWS:
            assert_close(f"{case.name} {held}", got, plain, exact)
            continue
        for name, want in exact.items():
            rms, allowed = (deviations(each[name], want)[1] for each in (got, plain))
            assert rms <= 2 * max(allowed, ROUNDING), (case.name, held, name, rms, allowed)


@pytest.mark.parametrize("backend", OURS)
def test_fp32_is_accurate_to_fp32(backend, poison, monkeypatch):
    monkeypatch.setattr(held_experts, "WINDOW_ROWS", 128)
    case = Case("fp32", 100, hidden=96, inner=160)
    layer = draw(case, torch.float32, "cuda")
    for held in case.parts:
        got = run(layer, held, backend)
        for name, want in run_exactly(layer, held).items():
            assert deviations(got[name], want)[1] < 2e-6, name


@pytest.mark.parametrize("backend", OURS)
def test_repeated_runs_are_bit_identical(backend, monkeypatch):
    monkeypatch.setattr(held_experts, "WINDOW_ROWS", 512)
    case = Case("repeat", 700, ends=(4, 16), top_k=4, hidden=256, inner=256)
    layer = draw(case, torch.bfloat16, "cuda")
    first = run(layer, case.parts[1], backend)
    for _ in range(3):
        again = run(layer, case.parts[1], backend)
        assert all(torch.equal(first[name], again[name]) for name in first)


def draw_routed(experts: tuple[int, ...], rows: int = 16_384) -> Layer:
    """Return a layer of gpt-oss's widths whose rows go to these experts alone."""
    case = Case("memory", 4, ends=(4, 16), top_k=4, hidden=2880, inner=2880)
    layer = draw(case, torch.bfloat16, "cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    picks = torch.rand(rows, len(experts), device="cuda", generator=generator).argsort(1)[:, :4]
    indices = torch.tensor(experts, device="cuda")[picks]
    if len(experts) == 1:
        indices = indices.expand(rows, 4).contiguous()
    x = torch.randn(rows, 2880, device="cuda", dtype=torch.bfloat16, generator=generator)
    weights = torch.rand(rows, 4, device="cuda", generator=generator).bfloat16()
    call = ExpertCall(x, indices, weights)
    return dataclasses.replace(layer, call=call, dout=x.clone(), adapters=NO_ADAPTERS)


@pytest.mark.parametrize("routed", [(1,), tuple(range(16)), tuple(range(8, 16))], ids=str)
def test_memory_does_not_depend_on_the_routing(routed):
    """All 65,536 routed tokens to one held expert, a quarter to held experts, or none."""
    layer, held = draw_routed(routed), range(0, 4)
    operands = take(layer, held, "packed")
    x, _, weights = layer.call
    out, gradients = torch.empty_like(x), Gradients(torch.empty_like(x), torch.empty_like(weights))
    window_bytes = 2 * held_experts.WINDOW_ROWS * 2880  # of one value per column
    peaks = []
    rows = None
    for step, columns in (("forward", 3), ("backward", 4)):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        if step == "forward":
            rows = run_held(layer.call, operands, held, out, experts=16)
        else:
            differentiate_held(
                *differentiated(layer), operands, held, gradients, experts=16, rows=rows
            )
        peaks.append(torch.cuda.max_memory_allocated() - before)
        assert peaks[-1] <= columns * window_bytes + (4 << 20), step


@pytest.mark.parametrize("backend", ["small", "packed", "decode"])
def test_exact_parts_are_rounded_as_the_whole_layer(backend, monkeypatch):
    """Several windows, and rows whose experts are spread over all parts: the same bits."""
    monkeypatch.setattr(held_experts, "WINDOW_ROWS", 512)
    case = Case("rounded_as_whole", 700, ends=(3, 4, 16), top_k=4, hidden=256, inner=256)
    layer = draw(case, torch.bfloat16, "cuda")
    with torch.no_grad():
        whole = expert_mlp(*layer.call, layer.stack, layer.adapters, backend=backend)
    parts = torch.full((len(case.parts), *whole.shape), torch.nan, dtype=torch.float64).cuda()
    for held, part in zip(case.parts, parts, strict=True):
        run_held(layer.call, take(layer, held, backend), held, part, experts=16)
    out = torch.empty_like(whole)
    sum_parts(parts, out)
    assert torch.equal(out, whole)
    sum_parts(parts.bfloat16(), out)
    assert not torch.equal(out, whole)


def test_a_pass_waits_for_no_result(monkeypatch):
    """Only for the number of windows, by an event, which is not reported as a synchronization."""
    monkeypatch.setattr(held_experts, "WINDOW_ROWS", 512)
    case = Case("no_wait", 700, ends=(4, 16), top_k=4, hidden=256, inner=256)
    layer = draw(case, torch.bfloat16, "cuda")
    run(layer, case.parts[0], "packed")  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(layer, case.parts[0], "packed")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_index_outside_the_layer_stops_the_device():
    code = (
        "import torch; from sparselong.kernels.experts.routing import HeldRows;"
        "indices = torch.full((3, 1), {}, device='cuda');"
        "HeldRows(indices, range(4, 8), 16, 64, 128); torch.cuda.synchronize()"
    )
    for index, is_wrong in ((-1, False), (15, False), (16, True), (-2, True)):
        command = [sys.executable, "-c", code.format(index)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode != 0) == is_wrong, index
        assert not is_wrong or "assert" in done.stderr


def test_few_rows_use_a_backend_with_gradients():
    layer = draw(Case("few", 2), torch.bfloat16, "cuda")
    assert choose_held(layer.call.x, layer.call.indices.numel(), 128) in OURS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_parts_are_added_in_order_and_rounded_once(dtype):
    parts = torch.randn(4, 1000, 2880, device="cuda").to(dtype)
    out = torch.full_like(parts[0], torch.nan)
    sum_parts(parts, out)
    total = parts[0].to(torch.promote_types(dtype, torch.float32))
    for part in parts[1:]:
        total = total + part
    assert torch.equal(out, total.to(dtype))
