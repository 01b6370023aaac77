"""The compiled kernel that sorts key gradients is bit-identical to plain torch."""

import pytest
import torch

from tests.kernels.key_gradients_interpreted import CASES, compare

CASES = CASES | {
    "bf16": ((0, 40), (0, 77), 2, torch.bfloat16),
    "gpt-oss": ((0, 6144), (0, 12288), 1, torch.bfloat16),
}


@pytest.mark.parametrize("case", CASES)
def test_kernel_matches_plain_torch(case):
    assert compare(*CASES[case], "cuda") == [True, True]
