"""Every way of opening a packed model fails, explained, unless exactly its tensors are there."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparselong.errors import StageError
from sparselong.model.loading import load_model, packed_config
from tests.conftest import load_script

INDEX = "model.safetensors.index.json"
BLOCKS = "model.layers.1.mlp.experts.gate_up_proj_blocks"
MASK = "model.layers.2.self_attn.k_proj.weight_mask"


@pytest.fixture(scope="module")
def compressed(small_arguments, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("opening") / "run"
    assert load_script("02_compress").main([*small_arguments, "--run-dir", str(run_dir)]) == 0
    return run_dir / "02_compress/model"


@pytest.fixture
def packed(compressed, tmp_path) -> Path:
    """A copy of stage 02's model that the test may damage."""
    return shutil.copytree(compressed, tmp_path / "model")


def open_as_trainer(directory: Path):
    """Open a model as Axolotl does."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def edit(directory: Path, change, name: str = MASK) -> None:
    """Change the tensors of the shard that holds a tensor, and the index accordingly."""
    index = json.loads((directory / INDEX).read_text())
    shard = directory / index["weight_map"][name]
    tensors, before = load_file(shard), set(load_file(shard))
    change(tensors)
    shard.unlink()  # it may be a hard link to the base
    save_file({k: v.contiguous() for k, v in tensors.items()}, shard, {"format": "pt"})
    for gone in before - set(tensors):
        index["weight_map"].pop(gone, None)
    index["weight_map"] |= dict.fromkeys(set(tensors) - before, shard.name)
    (directory / INDEX).write_text(json.dumps(index))


def put_adapter(directory: Path) -> None:
    """Put a working adapter beside the model."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["lm_head"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    a, b = torch.randn(2, 128), torch.randn(2048, 2)
    names = ("base_model.model.lm_head.lora_A.weight", "base_model.model.lm_head.lora_B.weight")
    save_file(dict(zip(names, (a, b), strict=True)), directory / "adapter_model.safetensors")


CASES = {
    "missing tensor": (
        lambda d: edit(d, lambda t: t.pop(MASK)),
        (f"{MASK} is missing",),
    ),
    "missing norm": (
        lambda d: edit(d, lambda t: t.pop("model.norm.weight"), "model.norm.weight"),
        ("model.norm.weight is missing",),
    ),
    "unexpected tensor": (
        lambda d: edit(d, lambda t: t.update({"model.extra.weight": torch.ones(2)})),
        ("model.extra.weight", "the model lacks"),
    ),
    "dense weight in the index": (
        lambda d: edit(d, lambda t: t.update({MASK.replace("_mask", ""): torch.ones(64, 128)})),
        (MASK.replace("_mask", ""), "the model lacks"),
    ),
    "another shape": (
        lambda d: edit(d, lambda t: t.update({MASK: t[MASK][:-1]})),
        (f"{MASK} does not have the shape",),
    ),
    "another type": (
        lambda d: edit(d, lambda t: t.update({BLOCKS: t[BLOCKS].view(torch.int8)}), BLOCKS),
        (f"{BLOCKS} does not have the shape and dtype", "torch.int8"),
    ),
    "fewer layers in the files": (
        lambda d: edit_config(d, num_hidden_layers=5, layer_types=["full_attention"] * 5),
        ("model.layers.4", "is missing"),
    ),
    "more layers in the files": (
        lambda d: edit_config(d, num_hidden_layers=3, layer_types=["full_attention"] * 3),
        ("model.layers.3", "the model lacks"),
    ),
    "single file appeared": (
        lambda d: save_file({"model.norm.weight": torch.ones(128)}, d / "model.safetensors"),
        ("two sets of weights",),
    ),
    "adapter appeared": (put_adapter, ("contains an adapter",)),
    "own weight file": (
        lambda d: edit_config(d, transformers_weights="dense-00000.safetensors"),
        ("transformers_weights",),
    ),
}


def edit_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("opening", [load_model, open_as_trainer])
@pytest.mark.parametrize("case", CASES)
def test_a_model_that_is_not_exactly_there_is_refused(packed, case, opening):
    change, words = CASES[case]
    change(packed)
    with pytest.raises(StageError) as caught:
        opening(packed)
    for word in words:
        assert word in str(caught.value), caught.value


def test_an_adapter_in_the_base_is_refused(base):
    """transformers would put it on the base that stage 04 measures."""
    put_adapter(base)
    with pytest.raises(StageError, match="contains an adapter"):
        load_model(base)
    with pytest.raises(StageError, match="contains an adapter"):
        packed_config(base)


def test_what_is_complete_opens(packed):
    ours, theirs = load_model(packed).state_dict(), open_as_trainer(packed).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization_config": {"quant_method": "sparselong", "weight_bits": 5}}, "weight_bits"),
        ({"quantization_config": ["mxfp4"]}, "quantization"),
        ({"layer_types": ["square"] * 4}, "square"),
        ({"num_hidden_layers": "four"}, "num_hidden_layers"),
    ],
)
def test_a_config_that_describes_no_model_is_explained(packed, changes, words):
    edit_config(packed, **changes)
    with pytest.raises(StageError, match=words):
        load_model(packed)
