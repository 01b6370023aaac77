"""05_export --to hf-bf16: what is not the model that transformers opens is not recorded as done."""

import json
import shutil

import pytest

from sparselong.config import load
from sparselong.errors import StageError
from sparselong.export.hf_bf16 import Bf16Format
from sparselong.run import Stage
from tests.stages.test_export import export
from tests.stages.trained import Trained


@pytest.fixture(scope="module")
def exported(plain_trained_run, tmp_path_factory) -> Trained:
    run_dir = tmp_path_factory.mktemp("bf16") / "run"
    ignored = shutil.ignore_patterns("05_export")
    shutil.copytree(plain_trained_run.run_dir, run_dir, symlinks=True, ignore=ignored)
    found = plain_trained_run._replace(run_dir=run_dir)
    assert export(found, "--to", "hf-bf16") == 0
    return found


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
    config = load(exported.arguments[1], exported.arguments[2:])
    options = {"from": "finetuned"}
    stage = Stage("05_export", config, exported.run_dir, part="hf-bf16", options=options)
    document = {**json.loads(before), key: value}
    document["layer_types"] = document["layer_types"][: document["num_hidden_layers"]]
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(StageError, match="does not hold the tensors of transformers") as caught:
        Bf16Format().verify(stage)
    (folder / "config.json").write_text(before)
    assert name in str(caught.value)
