"""The masked weight's kernel as compiled, and the layer that trains through it."""

from dataclasses import replace

import pytest
import torch

from tests.kernels.masked_weight_interpreted import CASES, Case, compare, draw

LARGE = [Case(4, True, 16, 4096, 2880), Case(4, True, 64, 2880, 4096), Case(8, True, 16, 512, 2880)]


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_the_kernel_gives_what_plain_torch_gives(case):
    row = compare(case, draw(case, "cuda"))
    assert row["weight"] <= 2e-3 and row["gate"] <= 2e-3, row
    assert 0.2 < row["passing"] <= 1.0, row


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_codes_are_those_of_the_rounded_weight(case):
    """What is baked is what the last forward multiplied with, to the bit."""
    weight = draw(case, "cuda")
    codes = weight.codes()
    if weight.scale is None:
        assert torch.equal(codes, weight.round())
        return
    back = (
        codes.float().view(*weight.scale.shape, -1) * weight.scale.float()[..., None]
    ).bfloat16()
    assert torch.equal(back.view(codes.shape), weight.round())


def test_an_untrained_adapter_leaves_the_stored_codes():
    drawn = {device: draw(LARGE[0], device) for device in ("cuda", "cpu")}
    gpu, cpu = (replace(w, lora_b=torch.zeros_like(w.lora_b)) for w in drawn.values())
    assert torch.equal(gpu.codes().cpu(), cpu.codes())
