"""The command that redoes a part, as messages print it, is one that the script takes."""

import json
import shlex

import pytest

from sparselong.export import CHOICE
from sparselong.run import Part, parse_arguments
from sparselong.run.stages import redo_command


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
    (tmp_path / "05_export/mxfp4").mkdir(parents=True)
    finished = json.dumps({"options": {"from": "finetuned"}})
    (tmp_path / "05_export/mxfp4/manifest.json").write_text(finished)
    where = ["--run-dir", str(tmp_path)]
    (part,) = parts_of(["--to", *words.split(), *where])
    python, script, *arguments = shlex.split(redo_command("05_export", part.name, part.options))
    assert [python, script, arguments.pop()] == ["python", "05_export.py", "--force"]
    assert parts_of([*arguments, *where]) == [part]
