"""Which files of a part's directory count as results."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from sparselong.config import load
from sparselong.export import outputs
from sparselong.export.formats import FORMATS
from sparselong.export.shards import write_side_files
from sparselong.run import Stage
from sparselong.run.own_files import remove_own
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


def test_documents_of_the_base_are_told_from_a_persons(tmp_path):
    """Of an unfinished part, which has no manifest; written again as after an interruption."""
    stage = Stage("05_export", load(ROOT / "configs/tiny.yaml"), tmp_path, part="mxfp4")
    for folder in (tmp_path / "model", stage.dir):
        folder.mkdir(parents=True)
    side_files = ("tokenizer.json", "LICENSE")
    for name in side_files:
        (tmp_path / "model" / name).write_text("the base's")
    source: Any = SimpleNamespace(directory=tmp_path / "model", side_files=side_files)
    for _ in range(2):
        write_side_files(stage, source, {"model.safetensors": {"a": ("U8", (3,))}}, {})
    (stage.dir / "README.md").write_text("a person's")
    assert remove_own(stage.dir, stage.name, stage.part) == ["README.md"]
