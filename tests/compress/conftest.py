"""One weight and correlated inputs, like activations.

With white noise GPTQ and SparseGPT could not improve on magnitude pruning and rounding, and a
broken correction would go unnoticed.
"""

import pytest
import torch

from sparselong.compress.weights.hessian import Hessian

OUT, IN = 48, 320
"""320 columns: two full blocks of 128 and a tail of 64; ten groups of 32 or five of 64."""
DAMPENING = 0.01


def draw(*shape: int, seed: int) -> torch.Tensor:
    """Draw normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _correlated_inputs() -> torch.Tensor:
    """1,500 tokens whose features share directions with strengths 1/rank, plus noise of 0.1."""
    shared = draw(1500, IN, seed=1) / torch.arange(1, IN + 1)
    return shared @ draw(IN, IN, seed=2) + 0.1 * draw(1500, IN, seed=3)


@pytest.fixture(scope="session")
def inputs() -> torch.Tensor:
    return _correlated_inputs()


@pytest.fixture(scope="session")
def hessian(inputs: torch.Tensor) -> torch.Tensor:
    accumulated = Hessian(IN, "layer")
    accumulated.add(inputs)
    return accumulated.matrix


@pytest.fixture(scope="session")
def weight() -> torch.Tensor:
    return (0.05 * draw(OUT, IN, seed=4)).bfloat16()
