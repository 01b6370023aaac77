"""NaN and infinity are found at every place of a tensor, and counted."""

import pytest
import torch
from safetensors.torch import save_file

from sparselong.checkpoint import Checkpoint
from sparselong.errors import StageError

LENGTH = 77  # vector lanes, and a tail


def opened(folder, name: str, tensor: torch.Tensor) -> Checkpoint:
    (folder / "config.json").write_text("{}")
    save_file({name: tensor}, folder / "model.safetensors", {"format": "pt"})
    return Checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite(tmp_path, dtype, value):
    tensor = torch.zeros(LENGTH, LENGTH, dtype=dtype)
    tensor.fill_diagonal_(value)  # each row has one, at each place in turn
    checkpoint = opened(tmp_path, "w", tensor)
    with pytest.raises(StageError, match=f"{LENGTH} NaN or infinite values"):
        checkpoint.read(["w"])
    for row in range(LENGTH):
        with pytest.raises(StageError, match="1 NaN or infinite values"):
            list(checkpoint.read_slices("w", range(row, row + 1)))


def test_scales_that_mean_nan(tmp_path):
    scales = torch.full((LENGTH, LENGTH), 254, dtype=torch.uint8).fill_diagonal_(255)
    checkpoint = opened(tmp_path, "w_scales", scales)
    for row in range(LENGTH):
        with pytest.raises(StageError, match="1 NaN or infinite values"):
            list(checkpoint.read_slices("w_scales", range(row, row + 1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
def test_tensors_without_values_are_finite(tmp_path, dtype):
    checkpoint = opened(tmp_path, "w_scales", torch.zeros(0, 3, dtype=dtype))
    assert checkpoint.read(["w_scales"])["w_scales"].shape == (0, 3)
