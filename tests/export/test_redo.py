"""The command that redoes a part, as messages print it, is one that the script takes."""

import json
import shlex

import pytest

from sparselong.config import load
from sparselong.errors import ConfigError, StageError
from sparselong.export import CHOICE
from sparselong.export.gguf import types
from sparselong.export.hub import HubFormat
from sparselong.run import Part, Stage, parse_arguments
from sparselong.run.stages import redo_command
from tests.conftest import ROOT
from tests.export.finished import write_finished


def parts_of(arguments: list[str]) -> list[Part]:
    return CHOICE.parts(parse_arguments("05_export", "", arguments, CHOICE.add_options))


@pytest.mark.parametrize(
    "words",
    [
        "mxfp4",
        "hf-bf16 --from compressed",
        "adapter",
        "gguf --dense-type q8_0",
        "ollama --from compressed",
        "hub --repo me/small",
    ],
)
def test_the_command_asks_for_the_same_part(tmp_path, words):
    write_finished(tmp_path, "mxfp4")
    where = ["--run-dir", str(tmp_path)]
    (part,) = parts_of(["--to", *words.split(), *where])
    python, script, *arguments = shlex.split(redo_command("05_export", part.name, part.options))
    assert [python, script, arguments.pop()] == ["python", "05_export.py", "--force"]
    assert parts_of([*arguments, *where]) == [part]


def test_an_empty_type_is_no_default():
    """As of a variable of the shell that is not set."""
    (part,) = parts_of(["--to", "gguf", "--dense-type", ""])
    assert part.options == {"from": "finetuned", "dense-type": ""}
    with pytest.raises(ConfigError, match="there is no such type"):
        types.check_dense_type(part.options["dense-type"])


def test_the_command_for_a_form_to_upload_makes_that_form(tmp_path):
    """Of the compressed model, with the type that it had."""
    options = {"from": "compressed", "dense-type": "q8_0"}
    config = load(ROOT / "configs/tiny.yaml")
    upload = {"from": "compressed", "to": "gguf hub", "repo": "me/small"}
    stage = Stage("05_export", config, tmp_path, part="hub", options=upload, reads=("02_compress",))
    row = {"path": "05_export/gguf/model.gguf", "bytes": 3, "sha256": "0"}
    same = {"config_hash": stage.hash, "made_from": {}}
    write_finished(tmp_path, "gguf", options=options, outputs=[row], **same)
    stage.dir.mkdir()
    for began in (same, {**same, "config_hash": "1"}):  # a file is missing; another config
        (stage.dir / "started.json").write_text(json.dumps(began))
        with pytest.raises(StageError) as caught:
            HubFormat().write(stage)
        command = caught.value.fix.partition("make it again: ")[2]
        (part,) = parts_of(shlex.split(command)[2:])
        assert (part.name, part.options) == ("gguf", options)
