"""The compiled kernel of the masked weight, and the layer that trains through it."""

import math
from dataclasses import replace

import pytest
import torch

from sparselong.kernels.dense.masked_weight import MaskedWeight
from sparselong.packing import integer
from tests.kernels.masked_weight_interpreted import CASES, Case, compare, draw

LARGE = [Case(4, True, 16, 4096, 2880), Case(4, True, 64, 2880, 4096), Case(8, True, 16, 512, 2880)]


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_kernel_matches_the_definition(case):
    row = compare(case, draw(case, "cuda"))
    assert row["weight"] <= 2e-3 and row["gate"] <= 2e-3, row
    assert 0.2 < row["passing"] <= 1.0, row


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
    passing = gpu.gate_(torch.ones_like(gpu.lora_b)).cpu() != 0
    lowest, highest = integer.code_range(bits)
    codes = torch.round(cpu.lora_b / cpu.scale.float())  # a true division, in fp32
    assert torch.equal(passing, (codes >= lowest) & (codes <= highest))
    assert 0 < passing.float().mean() < 1
