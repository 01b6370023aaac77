"""Skips this folder without a GPU; files that need several GPUs check for them."""

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Skip before any fixture allocates on a GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
