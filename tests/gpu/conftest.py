"""Without a GPU nothing of this folder runs; files that take more than one say so themselves."""

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Before the first fixture makes something on a GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
