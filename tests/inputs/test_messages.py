"""What people are told when something ends: the cause, what a rerun does, advice that fits."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from sparselong.config.schema import load
from sparselong.files import is_local
from sparselong.finetune.training_run import trainer_arguments
from sparselong.processes import TrainerEnded
from sparselong.processes.output import cause_of
from sparselong.processes.process import run_trainer
from sparselong.run import Stage, run_stage
from tests.conftest import ROOT

PLACE = '  File "train.py", line 7, in load\n    return torch.load(file)\n           ^^^^^^^^^^\n'
CAUSE = f"Traceback (most recent call last):\n{PLACE}EOFError: Ran out of input\n"
ABORT = 'Traceback (most recent call last):\n  File "core.py", line 1, in main\n    raise Abort()\n'
DIRECT = "\nThe above exception was the direct cause of the following exception:\n\n"
DURING = "\nDuring handling of the above exception, another exception occurred:\n\n"
BAR = " 50%|█████     | 5/10 [00:01<00:01,  4.9it/s]\n"
RICH_BAR = "Training ━━━━━━━━━━╸━━━━━━━━  50% 0:00:12\n"
EXPECTED = ['File "train.py", line 7, in load', "EOFError: Ran out of input"]
BOXED = (
    "╭───── Traceback (most recent call last) ─────╮\n"
    "│ /a/train.py:7 in load                       │\n"
    "│                                             │\n"
    "│ ❱ 7     return torch.load(file)             │\n"
    "╰─────────────────────────────────────────────╯\n"
    "EOFError: Ran out of input\n"
)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (CAUSE, EXPECTED),
        (f"{BAR * 30}{CAUSE}{BAR * 30}Aborted!\n", EXPECTED),
        (f"{CAUSE}{RICH_BAR * 20}\n\n", EXPECTED),
        (f"{CAUSE}{DIRECT}{ABORT}click.exceptions.Abort\n", EXPECTED),
        (f"{CAUSE}{DURING}{ABORT}SystemExit: 1\n", EXPECTED),
        (f"{ABORT}KeyError: 'first'\n{DURING}{CAUSE}", EXPECTED),
        (CAUSE.replace("EOFError", "\x1b[1;31mEOFError\x1b[0m"), EXPECTED),
        (f"{BOXED}{BAR}Aborted!\n", EXPECTED[1:]),
        (f"{CAUSE}wandb: waiting\n", [*EXPECTED, "wandb: waiting"]),
        (
            f"{BAR * 500}all is well\r 20%|##  | 1/5 [00:00<00:01]\rcut off\n{BAR}",
            ["all is well", "cut off"],
        ),
        (f"Segmentation fault\n{BAR}{RICH_BAR}╰────╯\nAborted!\n", ["Segmentation fault"]),
        ("".join(f"line {n}\n" for n in range(30)), [f"line {n}" for n in range(18, 30)]),
        (
            f"{CAUSE.strip()} at\nbyte 7\nof optimizer.pt\n",
            [*EXPECTED[:1], f"{EXPECTED[1]} at", "byte 7", "of optimizer.pt"],
        ),
        (
            f"pip: 5 files (3.2 MB)\n12 rows [train]\n{BAR}",
            ["pip: 5 files (3.2 MB)", "12 rows [train]"],
        ),
        (BAR, []),
        ("", []),
    ],
)
def test_the_last_lines_show_the_cause(output, expected):
    assert cause_of(output.splitlines(keepends=True)) == expected


def test_a_long_message_after_much_output_is_bounded():
    lines = [*BAR * 9, *CAUSE.splitlines(True), *(f"note {n}\n" for n in range(300))]
    found = cause_of(lines)
    assert found[:2] == EXPECTED and len(found) <= 12 and found[-1] == "note 299"


@pytest.mark.parametrize(
    "line",
    ["loss 5 at 50% | 3 of 4 [10:30]", "step 12 [10:30] failed", "disk is 100% full at 10:30"],
)
def test_a_cause_is_not_taken_for_a_progress_bar(line):
    assert cause_of([line, BAR]) == [line]


def test_a_silent_end_is_said_to_be_one(stage):
    with pytest.raises(TrainerEnded) as failure:
        run_trainer(stage, [sys.executable, "-c", "raise SystemExit(3)"])
    assert failure.value.found == "it wrote nothing that tells the cause"


@pytest.fixture
def stage(tmp_path) -> Stage:
    made = Stage("03_finetune", load(ROOT / "configs/tiny.yaml"), tmp_path)
    made.dir.mkdir()
    return made


AXOLOTL = """
import sys, time, click
@click.group()
def cli(): pass
@cli.command()
@click.argument("config")
@click.option("--launcher")
def train(config, launcher):
    for step in range(50):
        sys.stderr.write(f"\\r{step:3}%|###   | {step}/100 [00:01<00:01,  4.9it/s]")
    raise EOFError("Ran out of input")
"""


RANK = (
    "from pathlib import Path; from sparselong.finetune.rank import _train; _train(Path('a.yaml'))"
)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_cause_survives_the_trainers_command_line(stage, tmp_path, monkeypatch, ranks):
    """click turns an EOFError, such as that of an empty optimizer.pt, into "Aborted!"."""
    package = tmp_path / "path/axolotl/cli"
    package.mkdir(parents=True)
    (package / "main.py").write_text(AXOLOTL)
    for folder in (package, package.parent):
        (folder / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    with pytest.raises(TrainerEnded) as failure:
        program = trainer_arguments(stage) if ranks == 1 else ["-c", RANK]
        run_trainer(stage, [sys.executable, *program])
    assert "EOFError: Ran out of input" in failure.value.found
    assert "Aborted" not in failure.value.found and "it/s" not in failure.value.found
    assert failure.value.fix == f"see {stage.dir / 'log.txt'}"


def test_a_kill_from_outside_is_named_as_such(stage):
    code = "import os, signal; print('step 3', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(TrainerEnded, match="SIGKILL") as failure:
        run_trainer(stage, [sys.executable, "-c", code])
    assert "when memory runs out" in failure.value.found and "step 3" in failure.value.found


def test_output_that_is_not_utf_8_is_read(stage, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    code = "import sys; print('é'); sys.stdout.buffer.write(b'\\xff\\n'); raise ValueError('naïve')"
    with pytest.raises(TrainerEnded) as failure:
        run_trainer(stage, [sys.executable, "-c", code])
    assert "ValueError: naïve" in failure.value.found
    assert "é\n�\n" in (stage.dir / "log.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("01_health", "run the same command again"),
        ("02_compress", "run the same command again: finished layers are kept"),
    ],
)
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("end", [KeyboardInterrupt("SIGTERM"), OSError(28, "No space left")])
def test_an_interrupted_stage_says_what_a_rerun_does(tmp_path, capsys, name, sentence, force, end):
    def execute(stage: Stage) -> None:
        raise end

    arguments = ["--config", str(ROOT / "configs/tiny.yaml"), "--run-dir", str(tmp_path / "run")]
    arguments += ["--force"] * force
    assert run_stage(name, "", arguments, execute, lambda *_: {}, str) == 1
    if force and name != "01_health":  # a second --force would start over
        sentence = sentence.replace("again", "again without --force")
    assert capsys.readouterr().err.rstrip().endswith(sentence)


def test_a_forced_stage_that_never_began_is_forced_again(tmp_path, capsys, monkeypatch):
    """Its earlier result still stands, and would be up to date without --force."""
    (tmp_path / "run/02_compress").mkdir(parents=True)
    (tmp_path / "run/02_compress/manifest.json").write_text("{}")
    arguments = ["--config", str(ROOT / "configs/tiny.yaml"), "--run-dir", str(tmp_path / "run")]

    def check(config):
        raise KeyboardInterrupt

    run_stage("02_compress", "", [*arguments, "--force"], print, lambda *_: {}, str, check)
    assert "without --force" not in capsys.readouterr().err


PATHS = (
    *("/data/base", "./base", "../base", "~/base", "a/b/c", "base/", "my base", "a\\b", "a//b"),
    *("rows.jsonl", "data/rows.jsonl", "data/rows.json.gz", "part-0.parquet", "-x", "@a/b", ""),
)


@pytest.mark.parametrize("name", PATHS)
def test_a_missing_path_is_no_matter_of_the_hub(name):
    assert is_local(name)


@pytest.mark.parametrize("name", ["gpt2", "openai/gpt-oss-20b", "Qwen/Qwen2.5-7B", "a_b/c.d-e"])
def test_hub_names_are_not_taken_for_paths(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert not is_local(name)
    Path(name).mkdir(parents=True)
    assert is_local(name)


HUB = ("hub cache", "network", "HF_HUB_OFFLINE", "hf download", "connect")


@pytest.mark.parametrize(
    "script", ["02_compress", "03_finetune", "04_eval", "05_export", "01_health"]
)
@pytest.mark.parametrize("key", ["model.base", "data.train"])
def test_advice_for_a_missing_path_does_not_name_the_network(run_script, tmp_path, script, key):
    """Stages 03 and 04 are refused earlier, because stage 02 is not done."""
    where = f"{key}={tmp_path}/gone/rows.jsonl"
    told = run_script(script, where, "evaluation.tasks=[demo_hellaswag]")
    assert told.code == 1 and "Traceback" not in told.err
    for line in told.err.splitlines():
        if "rows.jsonl" in line or line.startswith("fix:"):
            assert not any(word in line for word in HUB), line


def test_notes_that_mean_nothing_here_are_not_passed_on():
    """bitsandbytes looks on the hub for a product that we never use, and says that it failed."""
    spec = importlib.util.find_spec("bitsandbytes")
    assert spec and spec.origin
    path = Path(spec.origin).parent / "backends/cpu/ops.py"
    note = "Failed to load CPU gemm_4bit_forward from kernels-community"
    assert note in path.read_text(), "another version: look whether it still warns"
    trust = "Skipping publisher trust check for 'kernels-community/quantization-bitsandbytes' as"
    code = (
        "import sparselong, logging, warnings\n"
        "sparselong.set_environment()\n"
        f"logging.getLogger('bitsandbytes.backends.cpu.ops').warning({note!r})\n"
        f"warnings.warn({trust!r})\n"
        "warnings.warn('another')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "another" in done.stderr
    assert "kernels-community" not in done.stderr


def test_a_machine_without_accelerator_is_no_reason_to_warn(monkeypatch, forked_python):
    """llm-compressor would warn on stdout, which with --json is one document."""
    monkeypatch.delenv("LLM_COMPRESSOR_LOG_LEVEL", raising=False)
    code = (
        "import sparselong\n"
        "sparselong.set_environment()\n"
        "import torch\n"
        "from llmcompressor.utils.dev import get_main_device\n"
        "torch.accelerator.is_available = lambda: False\n"
        "print(get_main_device())"
    )
    done = subprocess.run([forked_python, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "cpu\n"), done.stdout + done.stderr
