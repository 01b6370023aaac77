"""The trainer's process: resuming, failures across processes, receipts, supervision."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparselong.config.schema import load
from sparselong.errors import StageError
from sparselong.finetune import supervision
from sparselong.finetune.trainer import check_receipt, keep_rows
from sparselong.processes.failure import explain, read_failure
from sparselong.processes.process import run_trainer
from sparselong.run import Stage
from tests.conftest import ROOT, load_script


@pytest.fixture
def stage(tmp_path) -> Stage:
    made = Stage("03_finetune", load(ROOT / "configs/tiny.yaml"), tmp_path)
    made.dir.mkdir()
    return made


def test_rows_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    assert keep_rows(path, 2) == 2
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert keep_rows(path, None) == 0


def run_python(stage: Stage, code: str) -> None:
    run_trainer(stage, [sys.executable, "-c", code])


def test_an_expected_failure_crosses_the_processes(stage):
    code = (
        "from pathlib import Path\n"
        "from sparselong.processes.failure import tell_failures\n"
        "from sparselong.errors import StageError\n"
        f"tell_failures(Path({str(stage.dir)!r}))\n"
        "raise StageError('it broke', 'a whole one', 'pieces', 'repair it')\n"
    )
    with pytest.raises(StageError) as failure:
        run_python(stage, code)
    assert (failure.value.what, failure.value.fix) == ("it broke", "repair it")


def test_an_unexpected_failure_shows_its_last_lines(stage):
    with pytest.raises(StageError, match="exit code 1") as failure:
        run_python(stage, "print('all is well'); raise KeyError('a bug')")
    assert "KeyError: 'a bug'" in failure.value.found
    assert "all is well" in (stage.dir / "log.txt").read_text()


def test_marked_lines_are_shown_and_others_only_logged(stage, capsys):
    run_python(stage, "print('noise'); print('[sparselong] step 1')")
    shown = capsys.readouterr()
    assert shown.err == "step 1\n" and shown.out == ""
    assert "noise" in (stage.dir / "log.txt").read_text()


def test_the_trainer_dies_with_the_stage(stage, tmp_path):
    """After SIGKILL of the stage, the trainer it started must not continue writing."""
    note = tmp_path / "pid"
    child = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = (
        "import sys\n"
        "from pathlib import Path\n"
        "from sparselong.config.schema import load\n"
        "from sparselong.run import Stage\n"
        "from sparselong.processes.process import run_trainer\n"
        f"stage = Stage('03_finetune', load({str(ROOT / 'configs/tiny.yaml')!r}), "
        f"Path({str(tmp_path)!r}))\n"
        f"run_trainer(stage, [sys.executable, '-c', {child!r}])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    pid = int(note.read_text())
    while Path(f"/proc/{pid}/cmdline").exists() and time.monotonic() < deadline:
        if not Path(f"/proc/{pid}/cmdline").read_bytes():
            break  # dead, but not yet reaped by init
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{pid}").exists()


def test_a_full_disk_is_explained(tmp_path):
    for text in ("[Errno 28] No space left on device", "Error: I/O: No space left on device (28)"):
        told = explain(RuntimeError(text), tmp_path / "03_finetune")
        assert told and "free disk space" in told.expected
        assert told.what.startswith("03_finetune could not write to")
    assert explain(OSError(28, "kein Platz"), tmp_path)
    assert explain(OSError(2, "No space left on device"), tmp_path) is None
    assert explain(RuntimeError("index out of range"), tmp_path) is None
    (tmp_path / "failure.json").write_text('{"what": "cut o')
    failure = read_failure(tmp_path)
    assert failure and "free disk space" in failure.expected


@pytest.mark.parametrize(
    "broken", ["no receipt", "no callback", "no module", "no result", "backend"]
)
def test_without_a_full_receipt_there_is_no_result(stage, broken):
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    receipt = {
        "callbacks": ["MaskUpkeep", "Recomputation", "RouterWatch", "Metrics", "Stopping"],
        "processes": 1,
        "attention": "eager",
        "attention_backend": "auto",
        "deterministic": False,
        "modules_replaced": [f"model.layers.0.self_attn.{name}" for name in names],
    }
    (stage.dir / "baked.json").write_text("{}")
    (stage.dir / "receipt.json").write_text(json.dumps(receipt))
    check_receipt(stage, {"processes": 1, "attention": "eager"})
    if broken == "no receipt":
        (stage.dir / "receipt.json").unlink()
    elif broken == "no result":
        (stage.dir / "baked.json").unlink()
    elif broken == "backend":
        other = receipt | {"attention_backend": "torch_flash"}
        (stage.dir / "receipt.json").write_text(json.dumps(other))
    else:
        receipt["callbacks" if broken == "no callback" else "modules_replaced"].pop()
        (stage.dir / "receipt.json").write_text(json.dumps(receipt))
    with pytest.raises(StageError, match="without this project's plugin"):
        check_receipt(stage, {})


def test_the_receipt_says_how_layers_were_asked_to_compute(stage):
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    keys = {"training.slice_rows": 64, "attention_backend": "triton"}
    receipt = {
        "callbacks": ["MaskUpkeep", "Recomputation", "RouterWatch", "Metrics", "Stopping"],
        "attention_backend": "triton",
        "deterministic": False,
        "modules_replaced": [f"model.layers.0.self_attn.{name}" for name in names],
        "layers": {"asked": keys | {"attention_backend": "auto"}, "chosen": keys},
    }
    (stage.dir / "baked.json").write_text("{}")

    def check(asked: dict, **changed) -> None:
        (stage.dir / "receipt.json").write_text(json.dumps(receipt | changed))
        check_receipt(stage, asked)

    check({"training.slice_rows": 64})
    for asked in ({"training.slice_rows": 32}, {"training.slice_rows": "auto"}):
        with pytest.raises(StageError, match="without this project's plugin"):
            check(asked)
    with pytest.raises(StageError, match="without this project's plugin"):
        check({}, attention_backend="torch_flash")  # passes used another than was decided


def test_the_receipt_must_say_what_this_training_was_started_with(stage):
    receipt = {"processes": 2, "attention": "eager"}
    (stage.dir / "baked.json").write_text("{}")
    (stage.dir / "receipt.json").write_text(json.dumps(receipt))
    with pytest.raises(StageError) as failure:
        check_receipt(stage, {"processes": 4, "attention": "sparselong"})
    assert "processes 4, attention sparselong" in failure.value.found
    with pytest.raises(StageError) as failure:  # published later, with another number of GPUs
        check_receipt(stage, {})
    assert "processes" not in failure.value.found


def test_preview_colours_supervised_tokens():
    class Words:
        def decode(self, tokens):
            return " ".join("abcdef"[t] for t in tokens)

    rows = [{"input_ids": [0, 1, 2], "labels": [-100, -100, 2]}]
    end = "\n--- end: 3 tokens, 1 supervised ---\n"
    text = supervision.preview(rows, Words(), colour=True)
    assert f"\x1b[90ma b\x1b[0m\x1b[32mc\x1b[0m{end}" in text
    assert f"a b⟦c⟧{end}" in supervision.preview(rows, Words())


def test_the_script_refuses_without_stage_02(small_arguments, tmp_path, capsys):
    arguments = [*small_arguments, "--run-dir", str(tmp_path / "run")]
    assert load_script("03_finetune").main(arguments) == 1
    assert "03_finetune needs 02_compress" in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "run/03_finetune/axolotl.yaml")
