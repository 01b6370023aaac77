"""What a part's manifest says of its result."""

import hashlib
import json
from importlib import metadata

import pytest

from sparselong.config import load
from sparselong.errors import StageError
from sparselong.export import stage as module
from sparselong.export.gguf import form, reading
from sparselong.provenance import describe_software
from sparselong.run import Stage
from tests.conftest import ROOT
from tests.export.finished import write_finished


@pytest.mark.parametrize(
    ("part", "found", "wanted"),
    [
        ("gguf", {}, {"bytes": 3, "reloaded": True, "tensors_identical": True}),
        (
            "gguf",
            {"tensors_identical": False},
            {"bytes": 3, "reloaded": True, "tensors_identical": False},
        ),
        ("hub", {"uploaded_bytes": 70}, {"bytes": 70, "uploaded_bytes": 70}),
    ],
)
def test_metrics_claim_what_was_checked(tmp_path, monkeypatch, part, found, wanted):
    class Made:
        name, summary = part, ""

        def write(self, stage: Stage) -> None:
            stage.dir.mkdir(parents=True)
            for name in ("model.gguf", "README.md"):
                (stage.dir / name).write_text("abc")

        def verify(self, stage: Stage) -> dict:
            return found

    monkeypatch.setattr(module, "find_format", lambda _: Made())
    monkeypatch.setattr(module, "check_model_files", lambda _: None)
    monkeypatch.setattr(Stage, "log", lambda *_: None)
    config, options = load(ROOT / "configs/tiny.yaml"), {"from": "finetuned"}
    stage = Stage("05_export", config, tmp_path, part=part, options=options)
    module.export(stage)
    assert stage.metrics.pop("peak_host_bytes") > 0 and stage.metrics == wanted


def test_versions_of_what_exports_are_written_with_are_recorded():
    found = describe_software()["versions"]
    for name in ("gguf", "huggingface-hub"):
        assert found[name] == metadata.version(name)


def test_a_named_file_that_was_damaged_is_not_compared_for_ever(tmp_path, monkeypatch):
    def differ(*_: object) -> None:
        raise StageError("it differs", "a", "b", "run the same command again")

    monkeypatch.setattr(form, "_open", lambda _: (None, None))
    monkeypatch.setattr(reading, "compare_file", differ)
    options = {"from": "compressed", "dense-type": "q8_0"}
    stage = Stage(
        "05_export", load(ROOT / "configs/tiny.yaml"), tmp_path, part="gguf", options=options
    )
    stage.dir.mkdir(parents=True)
    (stage.dir / "model.gguf").write_text("damaged, or a person's")
    with pytest.raises(StageError, match="it differs") as caught:
        form.GgufFormat().verify(stage)
    command = "python 05_export.py --to gguf --from compressed --dense-type q8_0 --force"
    assert caught.value.fix == f"redo it: {command}" and (stage.dir / "model.gguf").exists()
    (stage.dir / "model.gguf.partial").write_text("damaged")
    with pytest.raises(StageError, match="run the same command again"):
        form.GgufFormat().verify(stage)
    assert [path.name for path in stage.dir.iterdir()] == ["model.gguf"]


def test_a_file_that_was_moved_and_linked_back_is_shared_itself(tmp_path):
    """Its link is relative, so that a link to the link would lead nowhere."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/model.gguf").write_text("abc")
    stage = Stage("05_export", load(ROOT / "configs/tiny.yaml"), tmp_path, part="ollama")
    stage.dir.mkdir(parents=True)
    same = {"config_hash": "0", "made_from": {}, "options": {}}
    (stage.dir / "started.json").write_text(json.dumps(same))
    digest = hashlib.sha256(b"abc").hexdigest()
    row = {"path": "05_export/gguf/model.gguf", "bytes": 3, "sha256": digest}
    write_finished(tmp_path, "gguf", outputs=[row], **same)
    (tmp_path / "05_export/gguf/model.gguf").symlink_to("../../disk/model.gguf")
    unfinished = stage.dir / "model.gguf.partial"
    assert form._link_twin(stage, unfinished)
    assert not unfinished.is_symlink()
    assert unfinished.samefile(tmp_path / "disk/model.gguf")
