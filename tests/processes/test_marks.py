"""What trainers print for the stage: shown, reported, logged; and a log without control codes."""

import re
import sys

import pytest

from sparselong.config import load
from sparselong.processes.process import run_trainer
from sparselong.run import Stage, progress
from tests.conftest import ROOT

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
TRAINER = r"""
import sys
from sparselong.processes import report_progress, tell
sys.stderr.write("\r 10%|#   | 1/10\r 20%|##  | 2/10\x1b[A\n")
print("\x1b[1;31mred\x1b[0m\x07 and \x9b31mmore")
tell("é → 漢\nsecond line")
for step in range(1, 4):
    report_progress("training step", step, 3, f"loss {step}.5 é")
"""


@pytest.fixture
def stage(tmp_path) -> Stage:
    made = Stage("03_finetune", load(ROOT / "configs/tiny.yaml"), tmp_path)
    made.dir.mkdir()
    return made


def test_marked_lines_are_shown_and_progress_is_reported(stage, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with stage.display:
        run_trainer(stage, [sys.executable, "-c", TRAINER])
    shown = capsys.readouterr().err.splitlines()
    assert shown == [
        *("é → 漢", "second line"),
        *("training step 1/3, loss 1.5 é", "training step 2/3, loss 2.5 é, 0 s left"),
        "training step 3/3, loss 3.5 é",
    ]
    log = (stage.dir / "log.txt").read_text()
    assert not CONTROL.search(log)
    assert "red and more\n" in log and "20%|##  | 2/10\n" in log
    assert "[sparselong] second line\n" in log and " training step 3/3, loss 3.5 é\n" in log
    assert "progress]" not in log


def test_other_ranks_report_nothing(stage, capsys):
    run_trainer(stage, [sys.executable, "-c", TRAINER], {1: {}})
    assert capsys.readouterr().err == ""
    log = (stage.dir / "log.rank1.txt").read_text()
    assert "second line" in log and "training step" not in log
