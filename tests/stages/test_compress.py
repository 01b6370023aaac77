"""02_compress end to end: outputs in every storage, and their cost."""

import json
import re
import subprocess

import pytest
import torch
from safetensors.torch import load_file

import sparselong  # noqa: F401  registers the packed format with transformers
from tests.conftest import ROOT
from tests.stages.conftest import run, stretch


@pytest.fixture(scope="module")
def metrics(compressed_run) -> dict:
    return json.loads((compressed_run / "02_compress/manifest.json").read_text())["metrics"]


def test_manifest_has_the_documented_metrics(metrics):
    assert metrics["experts_bit_exact"] is True
    assert metrics["two_four_conforming"] == 1.0
    assert metrics["masters_match"] is True
    assert metrics["bits_per_weight"]["experts"] < 4.35  # 4.25 and biases
    assert metrics["bits_per_weight"]["attention"] < 3.1  # 3.0 and biases and sinks
    assert metrics["bytes_on_disk"] < metrics["base_bytes_on_disk"]
    assert 0 < metrics["bytes_linked"] < metrics["bytes_on_disk"]
    assert metrics["peak_host_bytes"] > 0 and len(metrics["relative_error"]) == 4
    assert metrics["name"] == "base-w4a16-experts-4bit-2of4"


def test_some_layers_of_the_shared_run_are_refined(metrics):
    """Tests of interruption and of several processes would otherwise not see refined weights."""
    errors = [(found["solved"], found["refined"]) for found in metrics["attention_error"]]
    assert len(errors) == 4 and all(0 < refined <= solved for solved, refined in errors)
    assert sum(refined < solved for solved, refined in errors) >= 2


def test_fewer_sequences_than_asked_for_are_told(small_arguments, tmp_path, capsys):
    assert run(tmp_path / "run", [*small_arguments, "calibration.samples=999"], "--layers=0:1") == 0
    found = re.search(r"(\d+) calibration sequences of 64 tokens", shown := capsys.readouterr().err)
    assert found and f"warning: the training data fills {found[1]} of the 999 sequences" in shown


def test_files_are_smaller_and_linked(compressed_run, untrained_base):
    def total(folder):
        return sum(p.stat().st_size for p in folder.glob("*.safetensors"))

    model = compressed_run / "02_compress/model"
    assert total(model) < total(untrained_base)
    linked = [p for p in model.glob("model-*.safetensors") if p.stat().st_nlink > 1]
    assert linked and all(p.samefile(untrained_base / p.name) for p in linked)
    assert (
        compressed_run / "02_compress/base-w4a16-experts-4bit-2of4"
    ).resolve() == model.resolve()


def test_plain_transformers_opens_it_bitwise_equal(compressed_run):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        compressed_run / "02_compress/model", output_loading_info=True
    )
    assert not any(info.values())
    stored = {}
    for path in (compressed_run / "02_compress/model").glob("*.safetensors"):
        stored |= load_file(path)
    state = model.state_dict()
    assert set(state) == set(stored)
    for name, tensor in stored.items():
        assert torch.equal(state[name].to(tensor.dtype), tensor), name
    again = AutoModelForCausalLM.from_pretrained(compressed_run / "02_compress/model")
    tokens = torch.randint(0, 2000, (2, 80))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again(tokens).logits)


def test_stored_weights_equal_those_of_calibration(
    compressed_run, small_arguments, tmp_path, monkeypatch
):
    """The opened model's logits match the hidden states that streaming computed in memory."""
    from sparselong.compress.calibration import HiddenStates
    from sparselong.model.loading import load_model

    kept = {}
    original = HiddenStates.save

    def save(self, seconds):
        kept["states"] = self.states
        original(self, seconds)

    with monkeypatch.context() as patch:
        patch.setattr(HiddenStates, "save", save)
        assert run(tmp_path / "run", small_arguments) == 0
    model = load_model(tmp_path / "run/02_compress/model")
    from sparselong.compress.calibration import calibration_tokens
    from sparselong.config.schema import load
    from sparselong.data import encode_files
    from sparselong.model.tokenizer import load_tokenizer

    overrides = [a for a in small_arguments if "=" in a]
    config = load(small_arguments[1], overrides)
    tokenizer = load_tokenizer(model.name_or_path)
    tokens = calibration_tokens(config, encode_files(config, tmp_path / "run", tokenizer).train)
    with torch.no_grad():
        inner = model.model(tokens, output_hidden_states=True)
    assert torch.equal(inner.last_hidden_state, model.model.norm(kept["states"]))


def test_masters_keep_what_was_pruned(compressed_run, untrained_base):
    from sparselong.packing import dense
    from sparselong.packing.dense import DenseFormat

    fmt = DenseFormat(4, "2:4", 64)
    base = {}
    for path in untrained_base.glob("*.safetensors"):
        base |= load_file(path)
    name = "model.layers.2.self_attn.v_proj"
    packed = load_file(compressed_run / "02_compress/model/dense-00002.safetensors")
    tensors = {k.removeprefix(f"{name}."): v for k, v in packed.items() if k.startswith(name)}
    mask = dense.unpack_mask(fmt, tensors)
    master = load_file(compressed_run / "02_compress/masters/layer-00002.safetensors")[
        f"{name}.weight"
    ]
    original = base[f"{name}.weight"]
    assert torch.equal(master[~mask], original[~mask])
    assert not torch.equal(master[mask], original[mask])


@pytest.mark.parametrize(
    ("overrides", "attention_bits", "conforming"),
    [
        (["shared_dense.weight_bits=8"], 5.0, 1.0),
        (["shared_dense.weight_bits=16"], 8.75, 1.0),
        (["shared_dense.sparsity=none"], 4.25, None),
        (["shared_dense.weight_bits=16", "shared_dense.sparsity=none"], 16.0, None),
    ],
)
def test_every_storage_opens(small_arguments, tmp_path, overrides, attention_bits, conforming):
    from sparselong.model.loading import load_model

    assert run(tmp_path / "run", [*small_arguments, *overrides]) == 0
    metrics = json.loads((tmp_path / "run/02_compress/manifest.json").read_text())["metrics"]
    assert abs(metrics["bits_per_weight"]["attention"] - attention_bits) < 0.1
    if conforming is None:
        assert metrics["two_four_conforming"] < 0.5
    else:
        assert metrics["two_four_conforming"] == conforming
    assert torch.isfinite(
        load_model(tmp_path / "run/02_compress/model")(torch.tensor([[1, 2]])).logits
    ).all()


def test_two_four_experts_are_stored_compactly_and_open(small_arguments, tmp_path, untrained_base):
    from sparselong.model.loading import load_model
    from sparselong.packing import mxfp4, two_four

    assert run(tmp_path / "run", [*small_arguments, "experts.sparsity=2:4"]) == 0
    metrics = json.loads((tmp_path / "run/02_compress/manifest.json").read_text())["metrics"]
    assert metrics["bits_per_weight"]["experts"] < 3.15  # 3.0 and biases
    assert metrics["experts_bit_exact"] is False
    model, base = load_model(tmp_path / "run/02_compress/model"), load_model(untrained_base)
    pruned, whole = (
        mxfp4.unpack_codes(m.model.layers[3].mlp.experts.down_proj_blocks) for m in (model, base)
    )
    assert bool(two_four.is_two_four((pruned & 7) != 0).all())
    assert bool(((pruned == whole) | (pruned == 0)).all())


def test_peak_memory_does_not_grow_with_layers(tmp_path, small_arguments, forked_python):
    """Eight more layers add 53 MB of experts; the peak must not grow with them.

    Each run is a separate process, since memory cached from earlier runs would count too.
    """
    from sparselong.tiny.build import TinySpec, build_tiny

    spec = TinySpec(layers=2, hidden=256, intermediate=1024, experts=16, steps=0)
    base, peaks = build_tiny(tmp_path / "base", spec, seed=1), []
    for layers in (2, 10):
        deep = stretch(base, tmp_path / f"deep{len(peaks)}", layers)
        run_dir = tmp_path / f"run{len(peaks)}"
        arguments = [*small_arguments, f"model.base={deep}", "calibration.samples=4"]
        command = [forked_python, "02_compress.py", *arguments, "--run-dir", str(run_dir)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        metrics = json.loads((run_dir / "02_compress/manifest.json").read_text())["metrics"]
        assert metrics["base_bytes_on_disk"] > layers * 6_500_000
        peaks.append(metrics["peak_host_bytes"])
    assert peaks[1] - peaks[0] < 30_000_000, peaks  # one run differs from the next by 20


def test_mixed_shards_are_linked_if_little_of_them_is_replaced(tmp_path, small_arguments):
    """As in the published 120b, attention is under 5 % of every shard; nothing is copied."""
    from transformers import AutoModelForCausalLM

    from sparselong.tiny.build import TinySpec, build_tiny

    spec = TinySpec(layers=1, intermediate=1024, experts=48, steps=0)
    base = stretch(build_tiny(tmp_path / "one", spec, seed=1), tmp_path / "base", 2)
    run_dir = tmp_path / "run"
    assert run(run_dir, [*small_arguments, f"model.base={base}"]) == 0
    model = run_dir / "02_compress/model"
    for number in (1, 2):
        name = f"model-{number:05d}-of-00002.safetensors"
        assert (model / name).samefile(base / name)
    metrics = json.loads((run_dir / "02_compress/manifest.json").read_text())["metrics"]
    assert metrics["bytes_on_disk"] < metrics["base_bytes_on_disk"]
    assert metrics["bytes_linked"] < metrics["bytes_on_disk"]
    loaded, info = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
    assert not any(info.values())
    packed = load_file(model / "dense-00001.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight_packed"
    assert torch.equal(loaded.state_dict()[name], packed[name])


def test_a_shard_with_an_old_version_is_never_linked(untrained_base, tmp_path):
    """transformers would read both versions and use the one in the last file."""
    from sparselong.checkpoint import Checkpoint, derive, write_tensors

    base = Checkpoint(untrained_base)
    name = "model.layers.0.self_attn.sinks"
    tensors = base.read([name])
    write_tensors(tmp_path / "aaa.safetensors", {name: tensors[name] + 1})
    made = derive(base, tmp_path, {name}, [tmp_path / "aaa.safetensors"], {})
    assert torch.equal(made.read([name])[name], tensors[name] + 1)
    holders = [p.name for p in tmp_path.glob("*.safetensors") if name in load_file(p)]
    assert holders == ["aaa.safetensors"]


def test_dry_run_plans_and_touches_nothing(small_arguments, tmp_path, capsys):
    assert run(tmp_path / "run", small_arguments, "--dry-run") == 0
    assert "02_compress" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
