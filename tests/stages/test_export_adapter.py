"""05_export --to adapter: on the base that its config names, PEFT gives the model in training."""

import hashlib
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sparselong.adapters import expert_lora
from sparselong.config import load
from sparselong.errors import StageError
from sparselong.export.adapter import _open_with_peft
from sparselong.kernels.dense import masked_weight_torch
from sparselong.packing import mxfp4
from sparselong.run import Stage
from sparselong.run.stages import stage_hash
from tests.conftest import load_script, replace_values
from tests.stages.trained import TOKENS, Trained, open_training

export_script = load_script("05_export")


def export(trained: Trained, *more: str, run_dir=None) -> int:
    where = ["--run-dir", str(run_dir or trained.run_dir)]
    return export_script.main(replace_values([*trained.arguments, *where, *more]))


@pytest.fixture(scope="module")
def exported(plain_trained_run) -> Trained:
    assert export(plain_trained_run, "--to", "adapter", "mxfp4") == 0
    return plain_trained_run


@pytest.fixture(scope="module")
def folder(exported):
    return exported.run_dir / "05_export/adapter"


@pytest.fixture(scope="module")
def manifest(folder) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def open_base(base):
    """transformers' own model of the base, with its experts decoded, in fp32."""
    return AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").float().eval()


def add_to_weights(model, folder) -> None:
    """Add s·B·A to every adapted weight, by the definition of each kind of adapter."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = dict(model.named_parameters())
    for key in (key for key in tensors if ".lora_A." in key):
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        if ".experts" not in name:
            weights[f"{name}.weight"].add_(config["lora_alpha"] / config["r"] * (b @ a))
            continue
        weight = "gate_up_proj" if name.endswith(".base_layer") else "down_proj"
        target = weights[f"{name.removesuffix('.base_layer')}.{weight}"]
        r = len(a) // len(target)
        for expert, each in enumerate(target):  # [in, out]
            change = b[:, expert :: len(target)] @ a[expert * r : (expert + 1) * r]
            each.add_(config["lora_alpha"] / r * change.T)


@torch.no_grad()
def test_peft_on_the_base_gives_the_unrounded_model(exported, folder, untrained_base):
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(untrained_base)
    model = open_base(base)
    add_to_weights(model, folder)
    wanted = model(input_ids=TOKENS).logits
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unexpected keyword arguments .'sparselong_base'.")
        opened = PeftModel.from_pretrained(open_base(base), folder).eval()
    got = opened(input_ids=TOKENS).logits
    assert (got - wanted).norm() < 1e-5 * wanted.norm()
    with opened.disable_adapter():
        change = (wanted - opened(input_ids=TOKENS).logits).norm()
    assert change > 0.1 * wanted.norm(), "the adapter's effect is too small to test"
    # The model of stage 03 holds the sums rounded.
    assert 1e-3 * change < (exported.logits - wanted).norm() < change


@torch.no_grad()
def test_peft_on_the_base_gives_the_model_in_training_without_its_rounding(
    exported, folder, untrained_base, monkeypatch
):
    """Training rounds the sums of projections and routers to bf16; here it does not."""
    model = open_training(exported.run_dir, load(exported.arguments[1], exported.arguments[2:]))
    parts = ("master", "lora_a", "lora_b", "scaling", "more")
    monkeypatch.setattr(
        masked_weight_torch,
        "round_weight",
        lambda **of: masked_weight_torch.sum_weight(**{part: of[part] for part in parts}),
    )
    monkeypatch.setattr(expert_lora._Round, "apply", lambda total, dtype: total.to(dtype))
    wanted = model(input_ids=TOKENS).logits
    got = PeftModel.from_pretrained(open_base(untrained_base), folder).eval()(input_ids=TOKENS)
    assert (got.logits - wanted).norm() < 1e-5 * wanted.norm()


@torch.no_grad()
def test_the_distance_to_the_baked_model_is_reported_for_each_weight(
    exported, folder, manifest, untrained_base
):
    told = manifest["metrics"]["distance"]
    names = [*(f"self_attn.{p}_proj.weight" for p in "qkvo"), "mlp.router.weight"]
    names += ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert told.keys() == {f"model.layers.{n}.{name}" for n in range(4) for name in names}
    tensors = {}
    for path in (exported.run_dir / "05_export/mxfp4").glob("*.safetensors"):
        tensors |= load_file(path)
    before, summed = open_base(untrained_base), open_base(untrained_base)
    add_to_weights(summed, folder)
    for name, figures in told.items():
        weight, total = (model.get_parameter(name) for model in (before, summed))
        if "experts" in name:
            codes = (tensors[f"{name}_{part}"] for part in ("blocks", "scales"))
            baked = mxfp4.decode(*codes, torch.float32).transpose(1, 2)
        else:
            baked = tensors[name].float()
        change = (total - weight).norm()
        assert figures["lost"] == pytest.approx(float((baked - total).norm() / change), rel=1e-3)
        assert figures["relative_change"] == pytest.approx(float(change / weight.norm()), rel=1e-3)


def test_the_base_is_named_and_hashed(folder, manifest, untrained_base):
    config = json.loads((folder / "adapter_config.json").read_text())
    described = config["sparselong_base"]
    assert described == manifest["metrics"]["base"]
    files = {path.name: path for path in untrained_base.iterdir()}
    for name, digest in described["sha256"].items():
        assert hashlib.sha256(files[name].read_bytes()).hexdigest() == digest
    weights = {name for name in files if name.endswith(".safetensors")}
    assert weights < described["sha256"].keys() and "config.json" in described["sha256"]
    # Where ranks differ, vLLM would give another model.
    assert set(config["rank_pattern"].values()) != {config["r"]}
    assert "which vLLM would scale wrongly" in (folder / "log.txt").read_text()
    assert config["target_parameters"] == [
        *("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.router.weight")
    ]


@pytest.mark.parametrize("is_local", [True, False])
def test_an_adapter_whose_base_has_another_hash_is_refused(
    exported, untrained_base, tmp_path, monkeypatch, capsys, is_local
):
    """Of bases in the hub's cache, only the export itself compares the files."""
    ignored = shutil.ignore_patterns("05_export")
    run_dir = shutil.copytree(exported.run_dir, tmp_path / "run", symlinks=True, ignore=ignored)
    base = shutil.copytree(untrained_base, tmp_path / "base")
    path = base / "model-00001-of-00004.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    arguments = [*exported.arguments, f"model.base={base}"]
    config = load(arguments[1], arguments[2:])
    for name in ("02_compress", "03_finetune"):  # as if the run had been made with this name
        manifest = json.loads((run_dir / name / "manifest.json").read_text())
        manifest["config_hash"] = stage_hash(config, name)
        (run_dir / name / "manifest.json").write_text(json.dumps(manifest))
    if not is_local:
        monkeypatch.setattr("sparselong.run.directory.refuse_changed_inputs", lambda *_: None)
    assert export(Trained(run_dir, arguments, exported.logits), "--to", "adapter") == 1
    told = capsys.readouterr().err
    assert path.name in told and "has changed since 02_compress recorded it" in told
    assert not (run_dir / "05_export/adapter/adapter_model.safetensors").exists()


def test_the_plan_has_the_bytes_of_the_tensors(exported, folder, capsys):
    assert export(exported, "--to", "adapter", "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    tensors = load_file(folder / "adapter_model.safetensors").values()
    assert plan["bytes_on_disk"] == sum(tensor.nbytes for tensor in tensors)
    assert plan["estimated_seconds"] > 0


@pytest.mark.parametrize(
    "changes",
    [
        ["shared_dense.weight_bits=4"],
        ["shared_dense.sparsity=2:4"],
        ["experts.sparsity=2:4", "lora.expert_targets=[]", "lora.expert_r=null"],
    ],
)
def test_a_refusal_names_every_form_that_holds_the_model(exported, capsys, changes):
    assert export(exported, *changes, "--to", "adapter") == 2
    assert "pass --to mxfp4, gguf or hf-bf16, which hold" in capsys.readouterr().err


def test_a_damaged_adapter_is_refused(exported, tmp_path, capsys):
    run_dir = shutil.copytree(exported.run_dir, tmp_path / "run", symlinks=True)
    path = run_dir / "03_finetune/adapter/adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert export(exported, "--to", "adapter", "--force", run_dir=run_dir) == 1
    assert "has changed since 03_finetune recorded it" in capsys.readouterr().err


def test_what_the_disk_returns_is_compared_with_the_adapter(
    exported, tmp_path, monkeypatch, capsys
):
    ignored = shutil.ignore_patterns("05_export")
    run_dir = shutil.copytree(exported.run_dir, tmp_path / "run", symlinks=True, ignore=ignored)

    def damage(source, target):
        content = source.read_bytes()
        target.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    monkeypatch.setattr("sparselong.export.adapter.copy_atomically", damage)
    assert export(exported, "--to", "adapter", run_dir=run_dir) == 1
    assert "does not read as it was written" in capsys.readouterr().err
    assert not (run_dir / "05_export/adapter/manifest.json").exists()


def stage_of(exported: Trained, run_dir: Path) -> Stage:
    config = load(exported.arguments[1], exported.arguments[2:])
    return Stage("05_export", config, run_dir, part="adapter", options={"from": "finetuned"})


@pytest.mark.parametrize("changes", [{"r": 8}, {"target_modules": ["q_proj"]}], ids=str)
def test_each_tensor_must_have_its_place_in_peft(exported, tmp_path, changes):
    run_dir = shutil.copytree(exported.run_dir, tmp_path / "run", symlinks=True)
    path = run_dir / "05_export/adapter/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(StageError, match="does not fit the base"):
        _open_with_peft(stage_of(exported, run_dir))


@pytest.mark.filterwarnings("error:.*base_model_name_or_path", "error:Could not find a config")
def test_the_check_does_not_warn_that_its_model_is_not_the_base(exported):
    assert _open_with_peft(stage_of(exported, exported.run_dir)) > 0
