"""`ollama`: the GGUF file with a Modelfile.

Ollama reads and writes harmony (channels, tools, reasoning effort) if the file's architecture is
gpt-oss and the Modelfile's template contains `<|start|>` and `<|end|>`. Without a template it would
guess one. harmony.gotmpl is that template, in Go's language, with the fields that Ollama offers.

Sampling defaults are those of the model's generation_config.json, or plain sampling, as OpenAI
recommends for gpt-oss: Ollama's own would cut off less probable tokens. The context length is that
of training.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from sparselong.export.gguf.form import GgufFormat
from sparselong.export.gguf.types import FILE
from sparselong.export.inputs import model_directory
from sparselong.files import read_json, write_atomically
from sparselong.run import Stage

MODELFILE = "Modelfile"
_TEMPLATE = Path(__file__).with_name("harmony.gotmpl")
_GENERATION = "generation_config.json"
_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
"""Defaults of the parameters that are taken from the model; top_k 0 keeps all tokens."""


class OllamaFormat(GgufFormat):
    """A GGUF file and a Modelfile."""

    name = "ollama"
    summary = "the GGUF file and a Modelfile, for ollama create"

    def write(self, stage: Stage) -> None:
        """Write the Modelfile, and the file unless it can be linked."""
        write_atomically(stage.dir / MODELFILE, _modelfile(stage))
        super().write(stage)

    def verify(self, stage: Stage) -> dict[str, Any]:
        """Compare the file with its source; say how Ollama takes it."""
        metrics = super().verify(stage)
        stage.log(f"ollama create {_name(stage)} -f {shlex.quote(str(stage.dir / MODELFILE))}")
        return metrics


def _modelfile(stage: Stage) -> str:
    path = model_directory(stage) / _GENERATION
    chosen = read_json(path) if path.exists() else {}
    found = {key: chosen.get(key) for key in _SAMPLING}
    sampling = {k: _SAMPLING[k] if value is None else value for k, value in found.items()}
    parameters = {"num_ctx": stage.config.sequence_len, **sampling}
    lines = [f"PARAMETER {key} {value}" for key, value in parameters.items()]
    template = _TEMPLATE.read_text(encoding="utf-8").removesuffix("\n")
    return "\n".join([f"FROM ./{FILE}", f'TEMPLATE """{template}"""', *lines]) + "\n"


def _name(stage: Stage) -> str:
    """Return a name that Ollama accepts, after the run directory's."""
    words = re.findall("[a-z0-9]+", stage.run_dir.resolve().name.lower())
    return "-".join(["gpt-oss", *words])
