"""Masked LoRA on a whole model, and its state in checkpoints."""

import copy
import json

import pytest
import torch

from sparselong.adapters.attach import Masters, add_masked_lora, count_trainable, parameter_table
from sparselong.adapters.bake import bake_checkpoint, name_adapter
from sparselong.adapters.lora import masked_layers
from sparselong.errors import StageError
from sparselong.finetune import state
from sparselong.model.loading import load_model
from sparselong.model.projections import two_four_conforming
from tests.conftest import load_script


@pytest.fixture(scope="module")
def stage02(small_arguments, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("adapter") / "run"
    assert load_script("02_compress").main([*small_arguments, "--run-dir", str(run_dir)]) == 0
    return run_dir / "02_compress"


def tuned_model(stage02, targets=("q_proj", "o_proj")):
    model = load_model(stage02 / "model", device=torch.device("cpu"))
    masters = Masters(stage02 / "masters")
    return add_masked_lora(model, targets=targets, r=4, alpha=8.0, master_of=masters.read, seed=5)[
        0
    ]


TOKENS = torch.arange(3, 40)[None]


@torch.no_grad()
def test_untrained_adapter_changes_no_logit(stage02):
    plain = load_model(stage02 / "model", device=torch.device("cpu"))
    tuned = tuned_model(stage02)
    assert torch.equal(plain(input_ids=TOKENS).logits, tuned(input_ids=TOKENS).logits)
    layers = masked_layers(tuned)
    assert len(layers) == 8 and "model.layers.0.self_attn.q_proj" in layers
    assert all(layer.update("hysteresis") == 0.0 for layer in layers.values())


def test_only_a_and_b_are_trainable_and_the_table_says_so(stage02):
    tuned = tuned_model(stage02)
    trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert len(trained) == 16 and all(".lora_" in name for name in trained)
    assert f"{count_trainable(tuned):,}" in parameter_table(tuned).splitlines()[-1]


def test_the_seed_determines_the_adapter(stage02):
    torch.manual_seed(1)
    first = masked_layers(tuned_model(stage02))
    torch.manual_seed(2)
    second = masked_layers(tuned_model(stage02))
    for name, layer in first.items():
        assert torch.equal(layer.adapter()[0], second[name].adapter()[0])


@pytest.mark.parametrize(
    ("targets", "found"), [(("q_proj", "q_prj"), "no such layer"), (("experts",), "not a linear")]
)
def test_targets_that_match_nothing_are_refused(stage02, targets, found):
    with pytest.raises(StageError) as refusal:
        tuned_model(stage02, targets)
    assert found in refusal.value.found and "q_proj" in refusal.value.expected


@torch.no_grad()
def test_baked_model_gives_bitwise_equal_logits(stage02, tmp_path):
    tuned = tuned_model(stage02, ("q_proj", "k_proj", "v_proj", "o_proj"))
    layers = masked_layers(tuned)
    generator = torch.Generator().manual_seed(0)
    for layer in layers.values():
        layer.adapter()[1].copy_(0.05 * torch.randn(layer.out_features, 4, generator=generator))
    assert any(layer.update("hysteresis") > 0 for layer in layers.values())
    trained = tuned(input_ids=TOKENS).logits
    baked, rounding = bake_checkpoint(stage02 / "model", layers, tmp_path / "model")
    opened = load_model(tmp_path / "model", device=torch.device("cpu"))
    assert torch.equal(opened(input_ids=TOKENS).logits, trained)
    assert two_four_conforming(baked) == 1.0 and rounding == {}
    before = load_model(stage02 / "model", device=torch.device("cpu"))
    assert not torch.equal(before(input_ids=TOKENS).logits, trained)


@torch.no_grad()
def test_checkpoint_extras_are_restored(stage02, tmp_path):
    tuned = tuned_model(stage02)
    layers = masked_layers(tuned)
    for layer in layers.values():
        layer.adapter()[1].normal_(std=0.05)
        layer.update("hysteresis")
    stopped, updates = {"step": 9, "reason": "loss"}, [{"step": 3, "flipped": 0.1}]
    progress = state.Progress(tokens=12, stopped=stopped, mask_updates=updates)
    state.write(tmp_path, layers, progress)
    kept = {name: copy.deepcopy(layer.packed()) for name, layer in layers.items()}
    for layer in layers.values():
        layer.update("magnitude")
    assert state.read(tmp_path, layers) == progress
    for name, layer in layers.items():
        for part, tensor in layer.packed().items():
            assert torch.equal(tensor, kept[name][part])


def test_peaks_of_an_earlier_process_are_kept(stage02, tmp_path):
    layers = masked_layers(tuned_model(stage02))
    state.write(tmp_path, layers, state.Progress(peak_bytes={"host": 1 << 60, "cuda:7": 5}))
    assert state.read(tmp_path, layers).note_peaks() == {"host": 1 << 60, "cuda:7": 5}
    state.write(tmp_path, layers, state.Progress(peak_bytes={"host": 1}))
    assert state.read(tmp_path, layers).peak_bytes["host"] > 1 << 20


def test_the_adapter_names_its_base_without_a_path(stage02, tmp_path):
    tuned_model(stage02).save_pretrained(str(tmp_path))
    assert str(stage02) in (tmp_path / "adapter_config.json").read_text()
    name_adapter(tmp_path, "tiny-w4a16")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-w4a16" and config["r"] == 4
    assert (tmp_path / "README.md").read_text().startswith("# Adapter of tiny-w4a16\n")


def test_extras_of_other_layers_are_refused(stage02, tmp_path):
    state.write(tmp_path, masked_layers(tuned_model(stage02)), state.Progress())
    with pytest.raises(StageError, match="cannot be used"):
        state.read(tmp_path, masked_layers(tuned_model(stage02, ("k_proj",))))


def test_a_missing_master_is_named(stage02, tmp_path):
    with pytest.raises(StageError, match="no master of model.layers.0.self_attn.q_proj"):
        Masters(tmp_path).read("model.layers.0.self_attn.q_proj")
