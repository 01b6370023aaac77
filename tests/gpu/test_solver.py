"""The compiled sweep: its time, plain torch's results on a CPU, and the errors of a whole solve."""

import time

import pytest
import torch

from sparselong.compress.weights.solver import compress_weight
from sparselong.kernels.sweep import op, sweep_columns, triton_sweep
from sparselong.packing.dense import DenseFormat
from tests.kernels.sweep_interpreted import CASES, Case, count_differences, draw
from tests.poisoned import PoisonedTorch

INT4 = DenseFormat(4, "2:4", 64)
LIMIT_SECONDS = 0.15
"""Of one sweep over gpt-oss's query projection; two Python loops over the columns took 2 s."""
COMPARED_ROWS = 256
"""Rows are independent, and plain torch takes long for thousands of them."""


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    for module in (op, triton_sweep):
        monkeypatch.setattr(module, "torch", PoisonedTorch())


@pytest.fixture(scope="module")
def projection() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight of 4096 × 2880 and the factor of a correlated Hessian, on the CPU."""
    return draw(Case(4, True, group=64, rows=4096, columns=2880))


@pytest.mark.parametrize("case", [*CASES, Case(8, True, group=64, rows=70, columns=448)], ids=str)
def test_the_kernel_equals_plain_torch_bit_for_bit(case):
    weight, factor = draw(case)
    swept = sweep_columns(weight.cuda(), factor.cuda(), case.format)
    found = count_differences(swept, sweep_columns(weight, factor, case.format))
    assert not any(found.values()), found


@pytest.mark.parametrize("fmt", [INT4, DenseFormat(4, "none", 64)], ids=str)
def test_a_projection_is_swept_in_time_and_as_on_a_cpu(projection, fmt):
    """Values that tie within fp32's rounding may differ, in one of 10,000 codes."""
    weight, factor = projection
    on_gpu = weight.cuda(), factor.cuda()
    swept = sweep_columns(*on_gpu, fmt)  # compiles
    seconds = []
    for _ in range(3):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        again = sweep_columns(*on_gpu, fmt)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    assert not any(count_differences(again, swept).values()), "not reproducible"
    chosen = torch.arange(0, len(weight), len(weight) // COMPARED_ROWS)
    rows = type(swept)(*(None if t is None else t[chosen.cuda()] for t in swept))
    found = count_differences(rows, sweep_columns(weight[chosen], factor, fmt))
    share = {name: count / rows.values.numel() for name, count in found.items()}
    print(f"{fmt}: {sorted(seconds)[1]:.4f} s, share of different elements {share}")
    assert share["codes"] <= 1e-4 and share.get("mask", 0.0) <= 1e-4, share
    assert sorted(seconds)[1] <= LIMIT_SECONDS, seconds


def test_one_sweep_errs_less_than_two_and_as_on_a_cpu():
    """Factor and refit differ between devices by the order of their sums, and codes with them."""
    generator = torch.Generator().manual_seed(0)
    width = 640
    mixing = torch.randn(width, width, generator=generator)
    inputs = torch.randn(4096, width, generator=generator) / torch.arange(1, width + 1) ** 0.5
    inputs = inputs @ mixing
    inputs[:, 9], inputs[:, 40] = 30 * inputs[:, 9], 0.0
    hessian = 2 / len(inputs) * inputs.T @ inputs
    weight = (0.05 * torch.randn(256, width, generator=generator)).bfloat16()
    given = weight.cuda(), hessian.cuda()
    one = compress_weight(*given, INT4, 0.01, "layer").relative_error
    two = compress_weight(*given, INT4, 0.01, "layer", "llmcompressor").relative_error
    assert one <= 0.9 * two
    on_cpu = compress_weight(weight, hessian, INT4, 0.01, "layer").relative_error
    assert one == pytest.approx(on_cpu, rel=0.02)


def test_refuses_tensors_on_different_devices(projection):
    weight, factor = projection
    with pytest.raises(ValueError, match="factor: torch.float32 on cpu"):
        sweep_columns(weight.cuda(), factor, INT4)
