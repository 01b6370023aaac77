"""A sweep through Axolotl, killed in its second run and continued."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from sparselong.config import load
from tests.conftest import ROOT
from tests.stages.test_finetune import curve, rows_of, trainers_of, wait_for_step

pytestmark = pytest.mark.timeout(600)

TRAINING = [
    *("sequence_len=128", "micro_batch_size=2", "training.gradient_accumulation_steps=1"),
    *("training.max_steps=4", "training.eval_steps=2", "training.save_steps=2"),
    *("training.learning_rate=0.01", "training.lr_scheduler=rex", "training.min_lr_ratio=0.1"),
]
SWEEP = ["--sweep", "training.early_stopping_patience=8,9"]
"""Two configs that train alike: no training of four steps is stopped early."""
NAMES = ["early_stopping_patience=8", "early_stopping_patience=9"]


def start(python: str, arguments: list[str], run_dir: Path) -> subprocess.Popen[str]:
    script = [python, str(ROOT / "03_finetune.py")]
    command = [*script, *arguments, "--run-dir", str(run_dir), *SWEEP, "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def swept(compressed_run, small_arguments, forked_python) -> tuple[list[Path], dict, str, int]:
    """A sweep that was killed and continued: (its runs, its document, stderr of the second command,
    time of the first run's manifest when the sweep was killed)."""
    arguments = [*small_arguments, *TRAINING]
    folder = compressed_run.with_name(f"{compressed_run.name}-sweep")
    first, second = runs = [folder / name for name in NAMES]
    with start(forked_python, arguments, compressed_run) as process:
        wait_for_step(process, second, 3)
        os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while trainers_of(second):
        assert time.monotonic() < deadline, "a trainer outlived the sweep"
        time.sleep(0.1)
    made = (first / "03_finetune/manifest.json").stat().st_mtime_ns
    process = start(forked_python, arguments, compressed_run)
    out, told = process.communicate()
    assert process.returncode == 0, told
    return runs, json.loads(out), told, made


def test_a_killed_sweep_goes_on_with_the_run_that_it_was_in(swept):
    (first, _), document, told, made = swept
    assert "03_finetune is up to date in" in told and "resuming from checkpoint-2" in told
    assert (first / "03_finetune/manifest.json").stat().st_mtime_ns == made
    assert [row["status"] for row in document["runs"]] == ["done", "done"]
    assert json.loads((first.parent / "sweep.json").read_text()) == document
    assert (first.parent / "sweep.png").stat().st_size > 10_000


def test_the_killed_run_ends_like_the_other_one(swept):
    """In its curve, its model and its row of the comparison, which are those of the manifests."""
    runs, document, _, _ = swept
    straight, broken = (rows_of(run) for run in runs)
    assert curve(straight) == curve(broken) and straight[-1]["step"] == 4
    models = [sorted((run / "03_finetune/model").glob("*.safetensors")) for run in runs]
    for one, other in zip(*models, strict=True):
        assert one.read_bytes() == other.read_bytes()
    for run, row in zip(runs, document["runs"], strict=True):
        metrics = json.loads((run / "03_finetune/manifest.json").read_text())["metrics"]
        names = ("steps", "train_loss", "best_eval_perplexity", "best_step", "tokens")
        assert [row[name] for name in names] == [metrics[name] for name in names]
        assert row["best_eval_perplexity"] == min(
            value for step, value in metrics["eval_perplexity"].items() if step != "0"
        )


def test_a_run_has_the_config_of_a_run_of_its_own(swept, small_arguments):
    _, config, *overrides = [*small_arguments, *TRAINING]
    for run, patience in zip(swept[0], (8, 9), strict=True):
        mine = load(config, [*overrides, f"training.early_stopping_patience={patience}"])
        assert load(run / "config.yaml") == mine


def test_the_runs_share_the_weights_of_stage_02(swept, compressed_run):
    paths = sorted((compressed_run / "02_compress").rglob("*.safetensors"))
    assert len(paths) > 8
    for path in paths:
        for run in swept[0]:
            assert (run / path.relative_to(compressed_run)).samefile(path)
