"""The Modelfile's parameters come from the model, where it has them."""

import json
import re

import pytest

from sparselong.config import load
from sparselong.export.gguf import ollama
from sparselong.run import Stage
from tests.conftest import ROOT

PLAIN = {"temperature": "1.0", "top_p": "1.0", "top_k": "0"}


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (None, {}),
        ({"do_sample": True}, {}),
        ({"temperature": 0.6, "top_k": 40}, {"temperature": "0.6", "top_k": "40"}),
        ({"temperature": None, "top_p": None, "top_k": 0}, {}),  # null is no number for Ollama
    ],
)
def test_sampling_is_the_models_or_plain(tmp_path, found, wanted):
    config = load(ROOT / "configs/tiny.yaml")
    options = {"from": "compressed", "dense-type": "bf16"}
    stage = Stage("05_export", config, tmp_path, part="ollama", options=options)
    (tmp_path / "02_compress/model").mkdir(parents=True)
    if found is not None:
        path = tmp_path / "02_compress/model/generation_config.json"
        path.write_text(json.dumps(found))
    lines = re.findall(r"^PARAMETER (\w+) (\S+)$", ollama._modelfile(stage), re.MULTILINE)
    assert dict(lines) == {"num_ctx": str(config.sequence_len), **PLAIN, **wanted}
