"""Experts in host memory give the bits of experts on the device, in every way to run a layer."""

import pytest

from tests.kernels.run_interpreted import run_interpreted

LAYERS = 3
FIRST = {"plain, plain": 2 * LAYERS - 2, "adapters, plain": 2 * LAYERS - 2}
"""Layers that the first pass of a model copies."""


@pytest.fixture(scope="module")
def results(forked_python) -> dict:
    return run_interpreted(forked_python, "interpreted_host_experts")


@pytest.mark.parametrize("kind", ["plain", "adapters"])
@pytest.mark.parametrize("way", ["plain", "made", "kept", "inference"])
def test_results_are_the_same_bits(results, kind, way):
    found = results[f"{kind}, {way}"]
    assert found["equal"] and found["finite"]
    if way == "inference":
        assert found["copied"] <= LAYERS
    else:
        assert found["copied"] == FIRST.get(f"{kind}, {way}", 2 * LAYERS - 4)
