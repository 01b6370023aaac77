"""What `--dry-run` says of uploads, without a run."""

from pathlib import Path

import pytest

from sparselong.config import load
from sparselong.export import CHOICE, plan_export
from sparselong.export.plan import _plan_works
from sparselong.figures import format_bytes
from sparselong.run import Stage, parse_arguments
from tests.conftest import ROOT
from tests.export.finished import write_finished

CONFIG = str(ROOT / "configs/tiny.yaml")


def stages(run_dir: Path, words: str) -> list[Stage]:
    more = [*words.split(), "--config", CONFIG, "--run-dir", str(run_dir)]
    arguments = parse_arguments("05_export", "", more, CHOICE.add_options)
    return [
        Stage("05_export", load(CONFIG), run_dir, forced=arguments.force, part=part.name,
              options=part.options, reads=part.reads)
        for part in CHOICE.parts(arguments)
    ]  # fmt: skip


def plan(run_dir: Path, words: str) -> dict:
    return plan_export(stages(run_dir, words))


@pytest.mark.parametrize("name", ["mxfp4", "hf-bf16", "adapter", "gguf", "ollama"])
@pytest.mark.parametrize("more", ["", "--force"])
def test_forms_that_are_made_first_are_counted_in_the_upload(tmp_path, name, more):
    """A finished one by its manifest, unless it is made again."""
    words = f"--to {name} hub --repo me/x {more}"
    before = plan(tmp_path, words)
    size = before["writes"][0]["bytes"]
    assert size > 1000 and f"{format_bytes(size)} are uploaded" in before["notes"][-1]
    write_finished(tmp_path, name, metrics={"bytes": 7})
    shown = format_bytes(size if more else 7)
    assert f"{shown} are uploaded" in plan(tmp_path, words)["notes"][-1]


def test_the_upload_of_a_shared_file_counts_it_twice(tmp_path):
    """It is written once, and its source is not read again to write it."""
    first, second, _ = _plan_works(stages(tmp_path, "--to gguf ollama hub --repo me/x")).values()
    assert second.read_bytes == first.read_bytes / 2
    found = plan(tmp_path, "--to gguf ollama hub --repo me/x")
    size = found["writes"][0]["bytes"]
    assert found["writes"][1]["bytes"] == 0
    assert f"{format_bytes(2 * size)} are uploaded" in found["notes"][-1]
