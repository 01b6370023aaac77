"""The compiled kernels of the masked weight and of its factors' gradients."""

import math
from dataclasses import replace

import pytest
import torch

from sparselong.kernels.dense import factor_gradients, masked_weight
from sparselong.kernels.dense.masked_weight import MaskedWeight
from sparselong.packing import integer
from tests.kernels.masked_weight_interpreted import CASES, Case, compare, draw, unpack_gate
from tests.poisoned import PoisonedTorch

LARGE = [
    Case(4, True, 16, 4096, 2880),
    Case(4, True, 64, 2880, 4096),
    Case(8, True, 16, 512, 2880),
    Case(4, True, 16, 512, 2880, layers=3, more=3584),  # queries, keys and values of gpt-oss
    Case(16, False, 8, 2880, 4096),
]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    for module in (masked_weight, factor_gradients):
        monkeypatch.setattr(module, "torch", PoisonedTorch())


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_kernels_match_the_definition(case):
    """The gradients, which must repeat to the bit, err at most twice as much as torch's fp32
    products, or four roundings where those are nearly exact."""
    row = compare(case, draw(case, "cuda"))
    assert row["weight"] <= 2e-3 and row["gate"] <= 2e-3, row
    assert 0.2 < row["passing"] <= 1.0, row
    assert row["gradients"] <= max(2 * row["plain"], 2.4e-7), row


@pytest.mark.parametrize("sizes", [(4096, 512, 512), (64, 512), (2880,)], ids=str)
def test_gradients_of_layers_with_unequal_rows(sizes):
    """Each layer's gradients are those that it has alone, to the bit."""
    torch.manual_seed(0)
    outer = torch.randn(sum(sizes), 2880, device="cuda")
    words = torch.randint(-(2**31), 2**31, (sum(sizes), 90), dtype=torch.int32, device="cuda")
    pairs = [
        (torch.randn(16, 2880, device="cuda"), torch.randn(size, 16, device="cuda"))
        for size in sizes
    ]
    joint = factor_gradients.factor_gradients(outer, words, pairs, 2.0)
    parts = zip(joint, pairs, outer.split(sizes), words.split(sizes), strict=True)
    for got, pair, part, gate in parts:
        (alone,) = factor_gradients.factor_gradients(part, gate, [pair], 2.0)
        passed = 2.0 * part.double() * unpack_gate(gate)
        exact = pair[1].double().T @ passed, passed @ pair[0].double().T
        for one, other, true in zip(got, alone, exact, strict=True):
            assert torch.equal(one, other)
            assert one.is_contiguous() and (one - true).norm() <= 1e-6 * true.norm()


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_codes_match_the_rounded_weight(case):
    """The baked weight is bit-identical to the one used in the last forward pass."""
    weight = draw(case, "cuda")
    codes = weight.codes()
    if weight.scale is None:
        assert torch.equal(codes, weight.round())
        return
    back = (
        codes.float().view(*weight.scale.shape, -1) * weight.scale.float()[..., None]
    ).bfloat16()
    assert torch.equal(back.view(codes.shape), weight.round())


def test_an_untrained_adapter_keeps_the_stored_codes():
    drawn = {device: draw(LARGE[0], device) for device in ("cuda", "cpu")}
    gpu, cpu = (replace(w, lora_b=torch.zeros_like(w.lora_b)) for w in drawn.values())
    assert torch.equal(gpu.codes().cpu(), cpu.codes())


def draw_ties(bits: int, towards: float, device: str) -> MaskedWeight:
    """Draw weights halfway between two codes (also beyond the code range), exact in fp32, or the
    adjacent float towards `towards`. B is the whole weight, because A is the unit matrix."""
    generator = torch.Generator().manual_seed(bits)
    rows, columns = 4096, 64
    lowest, highest = integer.code_range(bits)
    halves = torch.randint(lowest - 1, highest + 1, (rows, columns), generator=generator) + 0.5
    scale = torch.exp2(14.0 * torch.rand(rows, 1, generator=generator) - 12.0).to(torch.bfloat16)
    weight = halves * scale.float()
    assert torch.equal(weight.double(), halves.double() * scale.double())
    if towards:
        weight = torch.nextafter(weight, torch.full_like(weight, towards))
    master = torch.zeros(rows, columns, dtype=torch.bfloat16, device=device)
    unit = torch.eye(columns, device=device)
    return MaskedWeight(master, unit, weight.to(device), 1.0, None, scale.to(device), bits)


@pytest.mark.parametrize("towards", [0.0, math.inf, -math.inf])
@pytest.mark.parametrize("bits", [4, 8])
def test_ties_and_adjacent_floats_round_like_a_true_division(bits, towards):
    """Multiplying by the reciprocal without a remainder correction misses many ties."""
    gpu, cpu = (draw_ties(bits, towards, device) for device in ("cuda", "cpu"))
    assert cpu.scale is not None
    expected = integer.quantize(cpu.lora_b, cpu.scale, bits)
    assert torch.equal(gpu.codes().cpu(), expected)
    assert torch.equal(gpu.round().cpu(), integer.dequantize(expected, cpu.scale))
    rounded, words = gpu.round_with_gate()
    assert words is not None and torch.equal(rounded, gpu.round())
    passing = unpack_gate(words).cpu()
    lowest, highest = integer.code_range(bits)
    codes = torch.round(cpu.lora_b / cpu.scale.float())  # a true division, in fp32
    assert torch.equal(passing, (codes >= lowest) & (codes <= highest))
    assert 0 < passing.float().mean() < 1
