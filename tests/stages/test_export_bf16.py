"""05_export --to hf-bf16 and mxfp4: only what their readers open as the model counts as done."""

import json
import shutil

import pytest

from sparselong.config import load
from sparselong.errors import ExpectedError, StageError
from sparselong.export.hf_bf16 import Bf16Format
from sparselong.export.mxfp4 import Mxfp4Format
from sparselong.run import Stage, read_manifest
from tests.stages.test_export import export
from tests.stages.trained import Trained


@pytest.fixture(scope="module")
def exported(plain_trained_run, tmp_path_factory) -> Trained:
    run_dir = tmp_path_factory.mktemp("bf16") / "run"
    ignored = shutil.ignore_patterns("05_export")
    shutil.copytree(plain_trained_run.run_dir, run_dir, symlinks=True, ignore=ignored)
    found = plain_trained_run._replace(run_dir=run_dir)
    assert export(found, "--to", "hf-bf16", "mxfp4") == 0
    return found


def open_part(exported: Trained, part: str) -> Stage:
    run_dir, config = exported.run_dir, load(exported.arguments[1], exported.arguments[2:])
    stage = Stage("05_export", config, run_dir, part=part, options={"from": "finetuned"})
    stage.manifests = {name: read_manifest(run_dir, name) or {} for name in stage.reads}
    return stage


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("vocab_size", 4096, "lm_head.weight"),  # a shape
        ("num_hidden_layers", 3, "model.layers.3."),  # names
    ],
)
def test_bf16_tensors_must_be_those_of_transformers_model(exported, key, value, name):
    folder = exported.run_dir / "05_export/hf-bf16"
    before = (folder / "config.json").read_text()
    stage = open_part(exported, "hf-bf16")
    document = {**json.loads(before), key: value}
    document["layer_types"] = document["layer_types"][: document["num_hidden_layers"]]
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(StageError, match="does not hold the tensors of transformers") as caught:
        Bf16Format().verify(stage)
    (folder / "config.json").write_text(before)
    assert name in str(caught.value)


def test_the_older_name_of_the_precision_is_not_kept(exported, tmp_path):
    """transformers reads both names."""
    source = tmp_path / "03_finetune/model"
    shutil.copytree(exported.run_dir / "03_finetune/model", source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    stage = open_part(exported._replace(run_dir=tmp_path), "hf-bf16")
    stage.dir.mkdir(parents=True)
    Bf16Format().write(stage)
    found = json.loads((stage.dir / "config.json").read_text())
    assert found["dtype"] == "bfloat16" and "torch_dtype" not in found


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantization_config", None),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("hidden_size", 192),
        ("architectures", ["LlamaForCausalLM"]),
    ],
)
def test_the_published_form_must_open_as_a_base(exported, key, value):
    path = exported.run_dir / "05_export/mxfp4/config.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), key: value}))
    try:
        with pytest.raises(ExpectedError):
            Mxfp4Format().verify(open_part(exported, "mxfp4"))
    finally:
        path.write_text(before)
    Mxfp4Format().verify(open_part(exported, "mxfp4"))
