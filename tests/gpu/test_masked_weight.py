"""The masked weight's kernel as compiled, and the layer that trains through it."""

import pytest
import torch

from sparselong.kernels.masked_weight import MaskedWeight
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
    weight = draw(LARGE[0], "cuda")
    weight = MaskedWeight(**{**vars(weight), "lora_b": torch.zeros_like(weight.lora_b)})
    cpu = MaskedWeight(**{n: t.cpu() if torch.is_tensor(t) else t for n, t in vars(weight).items()})
    assert torch.equal(weight.codes().cpu(), cpu.codes())
