"""Which models are measured: those of other folders under their own names, and what is not kept."""

import json
from pathlib import Path
from types import SimpleNamespace

from sparselong.config import load
from sparselong.evaluate import models, stage
from sparselong.evaluate.compared import find_compared
from sparselong.evaluate.perplexity import Sample
from sparselong.evaluate.work import Prompt, Questions
from tests.conftest import ROOT


def measurements(prompt: str = "a", token: int = 1) -> models.Measurements:
    prompts = [Prompt(prompt, 1, 1, [])]
    samples = [Sample([token, 2], [False, True])]
    return models.Measurements(SimpleNamespace(), Questions([], prompts, []), samples)  # type: ignore[arg-type]


def marks(run: Path, asked: models.Measurements) -> dict:
    for name in ("02_compress", "03_finetune"):
        (run / name).mkdir(exist_ok=True)
        if not (run / name / "model").exists():
            (run / name / "model").symlink_to(run / "base")
    manifests = {name: {"inputs": [], "outputs": []} for name in ("02_compress", "03_finetune")}
    config = load(ROOT / "configs/tiny.yaml", ["evaluation.divergence_samples=0"])
    this = SimpleNamespace(config=config, run_dir=run, dir=run, manifests=manifests)
    found = stage._list_marks(this, run / "base", [], asked)  # type: ignore[arg-type]
    return {mark.name: mark for mark in found}


def test_a_model_that_was_asked_something_else_is_measured_again(untrained_base, tmp_path):
    """As after an update of lm-eval or of a data set: its figures could not be compared."""
    (tmp_path / "base").symlink_to(untrained_base)
    before = marks(tmp_path, measurements())["finetuned"]
    kept = {**dict.fromkeys(models._RESULT), "fingerprint": before.fingerprint}
    (tmp_path / "finetuned.json").write_text(json.dumps(kept))
    assert models.find_kept(marks(tmp_path, measurements())["finetuned"], tmp_path) == kept
    for other in (measurements(prompt="b"), measurements(token=3)):
        assert models.find_kept(marks(tmp_path, other)["finetuned"], tmp_path) is None


def test_a_folder_named_like_an_own_model_does_not_take_its_place(
    untrained_base, tmp_path, monkeypatch
):
    (tmp_path / "base").symlink_to(untrained_base)
    monkeypatch.chdir(tmp_path)
    config = load(ROOT / "configs/tiny.yaml", ["evaluation.compare=[base]"])
    (found,) = find_compared(config)
    assert found.label == "./base" and found.directory == untrained_base.resolve()
