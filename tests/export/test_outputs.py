"""Which files of a part's directory count as results."""

import json

import pytest

from sparselong.config import load
from sparselong.export import outputs
from sparselong.export.formats import FORMATS
from sparselong.run import Stage
from tests.conftest import ROOT

OWN = {
    "mxfp4": {"model-00001-of-00001.safetensors", "model.safetensors.index.json", "config.json",
              "tokenizer.json", "LICENSE"},
    "adapter": {"adapter_config.json", "adapter_model.safetensors"},
    "gguf": {"model.gguf"},
    "ollama": {"model.gguf", "Modelfile"},
    "hub": {"README.md"},
}  # fmt: skip
OWN["hf-bf16"] = OWN["mxfp4"]


@pytest.mark.parametrize("part", [each.name for each in FORMATS])
def test_only_the_formats_own_files_are_results(tmp_path, monkeypatch, part):
    class Model:
        side_files = ("LICENSE", "tokenizer.json")

    monkeypatch.setattr(outputs, "take_inventory", lambda _: Model)
    config, options = load(ROOT / "configs/tiny.yaml"), {"from": "finetuned"}
    stage = Stage("05_export", config, tmp_path, part=part, options=options)
    stage.dir.mkdir(parents=True)
    theirs = {".env", "README.md", "notes.txt", "pytorch_model.bin", "log.txt", "written.json"}
    for name in OWN[part] | theirs:
        (stage.dir / name).write_text("x")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (stage.dir / "model.safetensors.index.json").write_text(json.dumps(index))
    assert outputs.list_outputs(stage) == sorted(stage.dir / name for name in OWN[part])
