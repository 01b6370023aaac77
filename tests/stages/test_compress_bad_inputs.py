"""02_compress on bases that strain the solver: handled, or refused by name before any long work."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.stages.conftest import run

NORM = "model.layers.{}.input_layernorm.weight"


def changed(base: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Return a copy of the base whose tensors a function has changed, all in one call."""
    shutil.copytree(base, folder)
    files = {path: load_file(path) for path in folder.glob("*.safetensors")}
    tensors = {name: tensor for found in files.values() for name, tensor in found.items()}
    change(tensors)
    for path, found in files.items():
        path.unlink()
        save_file({name: tensors[name].contiguous() for name in found}, path, {"format": "pt"})
    return folder


def kill_channels(tensors: dict[str, torch.Tensor]) -> None:
    """A third of the inputs of q, k and v are zero, and so are all of a head's values."""
    for layer in range(4):
        tensors[NORM.format(layer)][::3] = 0
        values = f"model.layers.{layer}.self_attn.v_proj"
        tensors[f"{values}.weight"][:64] = 0
        tensors[f"{values}.bias"][:64] = 0


def add_outliers(tensors: dict[str, torch.Tensor]) -> None:
    """Two inputs are ten thousand times as large as the others."""
    for layer in range(4):
        tensors[NORM.format(layer)][[5, 70]] *= 1e4


def starve_experts(tensors: dict[str, torch.Tensor]) -> None:
    """Half of the experts are never chosen."""
    for layer in range(4):
        tensors[f"model.layers.{layer}.mlp.router.bias"][::2] = -1e4


@pytest.mark.parametrize("change", [kill_channels, add_outliers, starve_experts])
def test_unusual_activations_are_compressed(untrained_base, small_arguments, tmp_path, change):
    from sparselong.model.loading import load_model

    base = changed(untrained_base, tmp_path / "base", change)
    assert run(tmp_path / "run", [*small_arguments, f"model.base={base}"]) == 0
    metrics = json.loads((tmp_path / "run/02_compress/manifest.json").read_text())["metrics"]
    assert metrics["experts_bit_exact"] and metrics["masters_match"]
    assert metrics["two_four_conforming"] == 1.0
    for layer in metrics["relative_error"]:
        assert set(layer) == {"q_proj", "k_proj", "v_proj", "o_proj"}
        assert all(0 < error < 0.5 for error in layer.values()), layer
    tokens = torch.arange(80)[None]
    whole, packed = (load_model(path) for path in (base, tmp_path / "run/02_compress/model"))
    with torch.no_grad():
        before, after = whole(tokens).logits, packed(tokens).logits
    assert torch.isfinite(after).all()
    # The weights are random: what is lost of them is lost. A layer that was broken gives about 0.
    assert torch.nn.functional.cosine_similarity(before, after, dim=-1).mean() > 0.7


def test_inputs_beyond_fp32s_squares_are_refused_by_name(
    untrained_base, small_arguments, tmp_path, capsys
):
    def overflow(tensors):
        tensors[NORM.format(2)][5] = 3e38

    base = changed(untrained_base, tmp_path / "base", overflow)
    assert run(tmp_path / "run", [*small_arguments, f"model.base={base}"]) == 1
    shown = capsys.readouterr().err
    assert "calibration inputs of layer 2's attention are not finite" in shown
    assert "check the base model's weights" in shown
    assert not (tmp_path / "run/02_compress/model").exists()


def test_a_hessian_that_cannot_be_factorized_is_refused_in_the_first_layer(
    small_arguments, tmp_path, capsys
):
    """32 tokens span a quarter of the inputs; such a small dampening leaves the rest singular."""
    few = ["calibration.samples=1", "calibration.sequence_len=32", "calibration.dampening=1e-12"]
    assert run(tmp_path / "run", [*small_arguments, *few]) == 1
    shown = capsys.readouterr().err
    assert "warning: 32 calibration tokens tell little of projections with 256 inputs" in shown
    assert "the Hessian of model.layers.0.self_attn.q_proj could not be factorized" in shown
    assert "fix:      use more calibration samples, or raise calibration.dampening" in shown
    assert not list((tmp_path / "run/02_compress/work").glob("layer-*.json"))


def test_a_gpu_that_is_lost_half_way_costs_no_finished_layer(
    compressed_run, small_arguments, tmp_path, monkeypatch
):
    from sparselong.compress.layer import CalibratedLayer
    from tests.stages.test_compress_interrupted import assert_same_result

    original = CalibratedLayer.run

    def lose(self, states):
        if self.index == 2:
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
        original(self, states)

    with monkeypatch.context() as patch:
        patch.setattr(CalibratedLayer, "run", lose)
        with pytest.raises(RuntimeError, match="ECC"):
            run(tmp_path / "run", small_arguments)
    assert "ECC" in (tmp_path / "run/02_compress/log.txt").read_text()
    first = tmp_path / "run/02_compress/model.partial/dense-00000.safetensors"
    written = first.stat().st_mtime_ns
    assert run(tmp_path / "run", small_arguments) == 0
    assert (tmp_path / "run/02_compress/model" / first.name).stat().st_mtime_ns == written
    assert_same_result(tmp_path / "run", compressed_run)
