"""Table lookup by GPU; needs no GPU."""

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


def test_an_older_gpu_is_refused():
    with pytest.raises(ValueError, match="sm_75; allowed: sm_80 and newer"):
        gpu.tiles_of_capability(7, 5)


def test_without_a_gpu_torch_and_interpreter_tiles_are_used():
    cpu = torch.device("cpu")
    assert gpu.architecture_of(cpu) == "cpu" and gpu.tiles_of(cpu) == "interpreter"


def test_measurements_are_per_gpu_and_tiles_per_architecture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    device = torch.device("cuda:7")
    try:
        assert gpu.architecture_of(device) == "sm_86"
        assert gpu.tiles_of(device) == "sm_80"
    finally:
        gpu.architecture_of.cache_clear()
        gpu.tiles_of.cache_clear()
