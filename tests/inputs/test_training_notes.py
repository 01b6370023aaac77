"""Metrics and notes of a training as people and disks leave them."""

import pytest

from sparselong.config import load
from sparselong.errors import StageError
from sparselong.finetune import plot, trainer
from sparselong.finetune.trainer import keep_rows
from sparselong.run import Stage
from tests.conftest import ROOT

ROW = '{"step": 2, "loss": 1.0, "tokens": 5, "tokens_per_second": 2.0}\n'


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (f"{ROW}my notes\n{ROW}", 2),
        (f'{ROW}{{"step": 4, "lo{ROW}', 2),
        ("[1]\n", 1),
        ('{"step": "2"}\n', 1),
        ('{"step": true}\n', 1),
        ('{"loss": 1.0}\n', 1),
        ('{"step": 2, "loss": null}\n', 1),
        ('{"step": 2, "loss": 1.0}\n', 1),
        ('{"step": 2, "eval_loss": 1.0}\n', 1),
        ("\n", 1),
        ("\xff\xfe", None),
        (None, None),
    ],
)
@pytest.mark.parametrize("step", [2, None])
def test_foreign_metrics_are_explained_and_left(tmp_path, data, line, step):
    path = tmp_path / "metrics.jsonl"
    path.mkdir() if data is None else path.write_bytes(data.encode("latin-1"))
    with pytest.raises(StageError) as failure:
        keep_rows(path, step)
    assert (f"{path}, line {line}," if line else str(path)) in failure.value.what
    assert path.is_dir() if data is None else path.read_bytes() == data.encode("latin-1")


def test_lost_metrics_are_no_obstacle(tmp_path):
    assert keep_rows(tmp_path / "metrics.jsonl", 4) == 0
    plot.draw([], [{"step": 2, "flipped": 0.5}], 2, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
@pytest.mark.parametrize("name", ["baked.json", "receipt.json"])
def test_a_damaged_note_is_explained(tmp_path, monkeypatch, name, text):
    stage = Stage("03_finetune", load(ROOT / "configs/tiny.yaml"), tmp_path)
    stage.dir.mkdir()
    if name == "baked.json":
        monkeypatch.setattr(trainer, "check_receipt", lambda *_: {})
    (stage.dir / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(StageError) as failure:
        trainer._publish(stage)
    assert str(stage.dir / name) in failure.value.what
    assert "baked.json" in failure.value.fix and "the same command" in failure.value.fix
