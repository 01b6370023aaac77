"""01_health end to end: exit codes, files and printed output."""

import json
import subprocess
import sys
import time

import pytest

from sparselong.health import sources
from tests.conftest import ROOT, load_script

script = load_script("01_health")
TINY = ("--config", str(ROOT / "configs/tiny.yaml"))
BIG = ("--config", str(ROOT / "configs/gpt-oss-120b-4x3090.yaml"))


@pytest.fixture(autouse=True)
def no_gpu_and_no_network(monkeypatch, tmp_path):
    """The same machine everywhere: no driver, no hub, nothing cached."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sources, "_is_offline", lambda: True)
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))


def test_tiny_is_ready(tmp_path, capsys):
    assert script.main([*TINY, "--run-dir", str(tmp_path / "run")]) == 0
    captured = capsys.readouterr()
    assert "ready: True" in captured.out and "ok    python" in captured.err
    assert "peak" in captured.err and "This machine can run" in captured.err
    folder = tmp_path / "run/01_health"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["metrics"]["ready"] is True
    assert {row["path"] for row in manifest["outputs"]} == {
        "01_health/report.json",
        "01_health/report.md",
    }
    assert json.loads((folder / "report.json").read_text())["ready"] is True


def test_120b_without_a_gpu_exits_1_and_json_has_everything(tmp_path, capsys):
    assert script.main([*BIG, "--run-dir", str(tmp_path / "run"), "--json"]) == 1
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["status"] == "failed"
    failed = {row["check"] for row in document["rows"] if row["status"] == "fail"}
    assert {"GPU", "sequence parallel", "base model", "training data"} <= failed
    assert "4 GPUs (compute capability 8.0 or newer)" in document["found"]
    for part in ("found", "fix"):  # a line of each check, also where a terminal shows them
        told = [line.partition(": ")[0] for line in document[part].splitlines()]
        assert told == [row["check"] for row in document["rows"] if row["status"] == "fail"]
        assert document[part].replace("\n", "\n          ") in captured.err
    plan = document["plan"]
    assert plan["sharded_peak_bytes_per_gpu"] < plan["replicated_peak_bytes_per_gpu"]
    assert plan["peak_bytes_per_gpu"] == plan["sharded_peak_bytes_per_gpu"]
    assert "Chosen for experts and vocabulary: sharded over 4" in captured.err
    assert "fix:      " in captured.err and "Traceback" not in captured.err
    folder = tmp_path / "run/01_health"
    assert not (folder / "manifest.json").exists()
    assert "cannot run" in (folder / "report.md").read_text()


def test_more_processes_than_cores_are_explained(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    arguments = [*TINY, "--run-dir", str(tmp_path / "run")]
    assert script.main([*arguments, "sequence_parallel_degree=64"]) == 1
    error, _, found, fix = capsys.readouterr().err.splitlines()[-4:]
    assert error.startswith("error:    ") and "too few cores for 64 processes" in found
    assert "(2)" in found and "sequence_parallel_degree=2 or less" in fix


def test_the_check_is_repeated_every_time(tmp_path):
    arguments = [*TINY, "--run-dir", str(tmp_path / "run")]
    manifest = tmp_path / "run/01_health/manifest.json"
    assert script.main(arguments) == 0 and manifest.exists()
    assert script.main([*arguments, "flash_attention=true"]) == 1
    assert not manifest.exists()


def test_dry_run_touches_nothing(tmp_path, capsys):
    assert script.main([*BIG, "--run-dir", str(tmp_path / "run"), "--dry-run"]) == 0
    assert "Plan of 01_health" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_stage_03_plans_both_ways_and_refuses_a_number_that_does_not_divide(tmp_path, capsys):
    arguments = [*BIG, "--run-dir", str(tmp_path / "run"), "--dry-run"]
    finetune = load_script("03_finetune")
    assert finetune.main(arguments) == 0
    shown = capsys.readouterr().out
    assert (
        "replicated      sharded  host memory" in shown
        and "(auto: replicated, 63.92 GiB of" in shown
    )
    split = ["sequence_parallel_degree=3", "expert_parallel_degree=3"]
    for further in ([], ["--dry-run"]):  # neither trains nor plans what cannot be
        assert finetune.main([*arguments[:-1], *further, *split]) == 2
        assert "does not divide the 128 experts" in capsys.readouterr().err
    assert finetune.main([*arguments[:-1], "expert_parallel_degree=8"]) == 2
    assert "4 processes of one machine cannot form groups of 8" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_config_error_exits_2(tmp_path, capsys):
    assert script.main([*TINY, "--run-dir", str(tmp_path / "run"), "sequence_length=9"]) == 2
    assert "did you mean sequence_len" in capsys.readouterr().err


def test_the_script_takes_seconds(tmp_path):
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "01_health.py", *TINY, "--run-dir", str(tmp_path / "run"), "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "done"
    assert time.monotonic() - start < 60  # a few seconds alone, longer on shared cores
