"""A sweep whose stages only pretend: they write what the real ones record, in milliseconds."""

import io
import json
from argparse import Namespace
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from sparselong.errors import StageError
from sparselong.processes import Ended
from sparselong.run import Stage, parse_arguments, run_stage
from sparselong.sweep import command, run_sweep
from tests.conftest import ROOT


class Scripts:
    """Stand-in for starting scripts; `started` are (stage, name of the run directory)."""

    def __init__(self):
        self.started: list[tuple[str, str]] = []
        self.interrupted = ""
        """Name of a run whose stage 03 is interrupted."""

    def run(self, script: Path, arguments: list[str]) -> Ended:
        """Run a stage in this process."""
        execute = {"02_compress": compress, "03_finetune": self.finetune}[script.stem]
        run_dir = Path(arguments[arguments.index("--run-dir") + 1])
        self.started.append((script.stem, run_dir.name))
        with redirect_stdout(io.StringIO()) as output:
            code = run_stage(
                script.stem, "", [*arguments, "--json"], execute, lambda *_: {}, lambda _: ""
            )
        return Ended(code, json.loads(output.getvalue()))

    def finetune(self, stage: Stage) -> None:
        """Write a model; fail if the learning rate is above 1."""
        if stage.run_dir.name == self.interrupted:
            self.interrupted = ""
            (stage.dir / "checkpoints").mkdir()
            raise KeyboardInterrupt("SIGTERM")
        rate, rank = stage.config.training.learning_rate, stage.config.lora.r
        if rate > 1:
            raise StageError("training diverged at step 1", "a finite loss", "nan", "lower it")
        lowest = 10 + rate + rank
        (stage.dir / "model").mkdir(exist_ok=True)
        (stage.dir / "model/dense.safetensors").write_text(f"{rate} {rank}")
        stage.inputs = [stage.run_dir / "data/validation.jsonl"]
        stage.outputs = [stage.dir / "model"]
        stage.peak_bytes = {"host": 2**30}
        stage.metrics = {
            **{"steps": 4, "train_loss": 2.5, "best_step": 4, "tokens": 1234},
            **{"best_eval_perplexity": lowest, "trainable_parameters": 100 * rank},
            "eval_perplexity": {"0": 20.0, "2": lowest + 1, "4": lowest},
            **{"tokens_per_second": 500.0, "gpu_hours": 0.5, "cost": 1.75},
        }


def compress(stage: Stage) -> None:
    """Write a model and data that depend on the config."""
    date, data = stage.run_dir / "date.txt", stage.run_dir / "data"
    if not date.exists():
        date.write_text(f"2026-01-{len(list(stage.run_dir.parent.iterdir())):02d}\n")
    data.mkdir(exist_ok=True)
    (data / "source.json").write_text("{}")
    (data / "validation.jsonl").write_text(f"rows, drawn with {stage.config.seed}\n")
    (stage.dir / "model").mkdir(exist_ok=True)
    bits = stage.config.shared_dense.weight_bits
    (stage.dir / "model/dense.safetensors").write_text(f"{bits} bits")
    stage.inputs, stage.outputs = [data / "validation.jsonl"], [stage.dir / "model"]


@pytest.fixture
def scripts(monkeypatch) -> Scripts:
    """The stand-in, in place of what starts scripts."""
    made = Scripts()
    monkeypatch.setattr(command, "run_script", made.run)
    return made


Sweep = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture
def sweep(scripts, tmp_path) -> Sweep:
    """Run a sweep of the tiny config in `tmp_path/run-sweep`; return its document and text."""

    def sweep(*words: str) -> tuple[dict[str, Any], str]:
        line = ["--config", str(ROOT / "configs/tiny.yaml"), "--run-dir", str(tmp_path / "run")]
        arguments: Namespace = parse_arguments("03_finetune", "", [*line, *words])
        return run_sweep(arguments, lambda config: None, ROOT)

    return sweep


@pytest.fixture
def compressed(scripts, tmp_path) -> Path:
    """The run directory itself, with stage 02 done."""
    line = ["--config", str(ROOT / "configs/tiny.yaml"), "--run-dir", str(tmp_path / "run")]
    assert scripts.run(ROOT / "02_compress.py", line).code == 0
    scripts.started.clear()
    return tmp_path / "run"
