"""Which tables a GPU reads; no GPU is asked."""

import pytest
import torch

from sparselong.kernels import gpu
from sparselong.kernels.attention import tiles as attention_tiles
from sparselong.kernels.experts import tiles as expert_tiles


@pytest.mark.parametrize(
    ("capability", "tiles"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_90"),
    ],
)
def test_every_supported_gpu_has_tiles(capability, tiles):
    assert gpu.tiles_of_capability(*capability) == tiles
    assert tiles in attention_tiles.TILES and tiles in expert_tiles.TILES


def test_an_older_gpu_is_refused_by_name():
    with pytest.raises(ValueError, match="sm_75; allowed: sm_80 and newer"):
        gpu.tiles_of_capability(7, 5)


def test_without_a_gpu_there_are_torchs_backend_and_the_interpreters_tiles():
    cpu = torch.device("cpu")
    assert gpu.architecture_of(cpu) == "cpu" and gpu.tiles_of(cpu) == "interpreter"


def test_a_gpu_is_measured_by_itself_and_tiled_with_its_like(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    device = torch.device("cuda:7")
    try:
        assert gpu.architecture_of(device) == "sm_86"
        assert gpu.tiles_of(device) == "sm_80"
    finally:
        gpu.architecture_of.cache_clear()
        gpu.tiles_of.cache_clear()
