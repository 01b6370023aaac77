"""Helpers to run stage 02, and a finished run that several files share."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import load_script
from tests.stages.trained import Trained, finish_training

compress_script = load_script("02_compress")


def run(run_dir: Path, arguments: list[str], *more: str) -> int:
    return compress_script.main([*arguments, "--run-dir", str(run_dir), *more])


@pytest.fixture(scope="session")
def compressed_run(tmp_path_factory, small_arguments) -> Path:
    """A finished stage 02 on the untrained model."""
    run_dir = tmp_path_factory.mktemp("compress") / "run"
    assert run(run_dir, small_arguments) == 0
    return run_dir


def stretch(base: Path, folder: Path, layers: int) -> Path:
    """Repeat the base's layers as a deeper model with one shard per layer."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors*", "tiny.json"))
    tensors = {}
    for path in base.glob("*.safetensors"):
        tensors |= load_file(path)
    config = json.loads((base / "config.json").read_text())
    period, weight_map = config["num_hidden_layers"], {}
    shards = [{k: v for k, v in tensors.items() if ".layers." not in k}]
    for layer in range(layers):
        prefix = f"model.layers.{layer % period}."
        shards.append(
            {
                k.replace(prefix, f"model.layers.{layer}."): v.clone()
                for k, v in tensors.items()
                if k.startswith(prefix)
            }
        )
    for number, shard in enumerate(shards):
        name = f"model-{number:05d}-of-{layers:05d}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    config["layer_types"] = [config["layer_types"][layer % period] for layer in range(layers)]
    config["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


ADAPTED = [
    "lora.expert_targets=[gate_up_proj, down_proj]",
    "lora.expert_r=2",
    "lora.router=true",
]


@pytest.fixture(scope="session")
def trained_run(compressed_run, small_arguments, tmp_path_factory) -> Trained:
    """A finished run of int4 2:4 attention, with adapters on attention, experts and router.

    Its directory has spaces, brackets and letters beyond ASCII.
    """
    run_dir = tmp_path_factory.mktemp("trained") / "größe [1] × 2"
    shutil.copytree(compressed_run, run_dir, symlinks=True)
    return finish_training(run_dir, [*small_arguments, *ADAPTED])


@pytest.fixture(scope="session")
def plain_trained_run(small_arguments, tmp_path_factory) -> Trained:
    """A finished run of bf16 attention without 2:4, with the same adapters."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    plain = ["shared_dense.weight_bits=16", "shared_dense.sparsity=none"]
    assert run(run_dir, [*small_arguments, *plain]) == 0
    return finish_training(run_dir, [*small_arguments, *plain, *ADAPTED])
