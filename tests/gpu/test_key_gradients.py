"""The kernel that sorts key gradients, as compiled: plain torch's bits."""

import pytest
import torch

from tests.kernels.key_gradients_interpreted import CASES, compare

CASES = CASES | {
    "bf16": ((0, 40), (0, 77), 2, torch.bfloat16),
    "gpt-oss": ((0, 6144), (0, 12288), 1, torch.bfloat16),
}


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_gives_what_plain_torch_gives(case):
    assert compare(*CASES[case], "cuda") == [True, True]
