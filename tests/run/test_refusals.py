"""Scripts refuse invalid input of every kind before they import heavy modules."""

import ast
import json
import os
import shlex
import subprocess
import sys

import pytest

from sparselong.run.manifests import FORMAT_VERSION
from sparselong.run.stages import STAGES, complete_commands
from tests.conftest import ROOT, load_script

HEAVY = {"torch", "transformers", "axolotl", "peft", "datasets", "lm_eval", "matplotlib"}
TRY = """
import json, sys
from tests.conftest import load_script
script = load_script(sys.argv[1])
codes = [script.main(arguments) for arguments in json.loads(sys.argv[2])]
print(json.dumps([codes, sorted(sys.modules)]))
"""
SCRIPTS = sorted(path.stem for path in ROOT.glob("0*.py"))


def refuse(script: str, cases: list[list[str]], **environment: str) -> tuple[list[int], set[str]]:
    """Return a script's exit codes for several command lines, and the imported modules."""
    done = subprocess.run(
        [sys.executable, "-c", TRY, script, json.dumps(cases)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    codes, modules = json.loads(done.stdout.splitlines()[-1])
    assert done.stderr.count("error:    ") == len(cases), done.stderr
    return codes, set(modules)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_refusal_imports_nothing_heavy(script, tmp_path):
    to = ["--to", "mxfp4"] if STAGES[script].parts else []
    config = [*to, "--config", str(ROOT / "configs/tiny.yaml")]
    (tmp_path / "file").write_text("")
    other = tmp_path / "other" / script / "".join(to[1:])
    other.mkdir(parents=True)
    begun = {"format_version": FORMAT_VERSION, "config_hash": "0", "options": {"from": "finetuned"}}
    (other / "started.json").write_text(json.dumps(begun))
    (other / "begun").write_text("")
    run_dirs = [tmp_path / "file", tmp_path / "file/run", "/proc/self/run", "/proc/self"]
    cases = [[*config, "--run-dir", str(run_dir)] for run_dir in run_dirs]
    cases += [
        [*config, "sed=1"],
        [*config, "training.save_steps=7"],
        [*to, "--config", "absent.yaml"],
    ]
    expected = [1, 1, 1, 2, 2, 2, 2]
    if script != "01_health":  # always repeated, and reads no other stage
        cases.append([*config, "--run-dir", str(tmp_path / "other")])
        expected.append(1)
    if STAGES[script].reads:
        cases.append([*config, "--run-dir", str(tmp_path / "new")])
        expected.append(1)
    codes, modules = refuse(script, cases)
    assert codes == expected
    assert not modules & HEAVY


def test_a_stride_that_does_not_divide_the_heads_is_refused_early(tmp_path):
    write_stage_02(tmp_path)
    split = ["sequence_parallel_degree=2", "heads_k_stride=4"]  # the tiny model has two heads
    config = ["--config", str(ROOT / "configs/tiny.yaml"), "--run-dir", str(tmp_path), *split]
    codes, modules = refuse("03_finetune", [config])
    assert codes == [2] and not modules & HEAVY


def write_stage_02(run_dir) -> None:
    """Write a manifest that marks stage 02 as done."""
    from sparselong.config import load
    from sparselong.run.stages import stage_hash

    config = load(ROOT / "configs/tiny.yaml")
    made: dict[str, object] = {
        "format_version": FORMAT_VERSION,
        "config_hash": stage_hash(config, "02_compress"),
    }
    (run_dir / "02_compress").mkdir()
    made |= {"stage": "02_compress", "status": "done", "seconds": 1.0, "metrics": {}}
    (run_dir / "02_compress/manifest.json").write_text(
        json.dumps({**made, "inputs": [], "outputs": []})
    )


def test_processes_that_cannot_rendezvous_are_refused_early(tmp_path):
    """Several processes that torchrun did not start."""
    config = ["--config", str(ROOT / "configs/tiny.yaml"), "--run-dir", str(tmp_path)]
    world = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    codes, modules = refuse("03_finetune", [config], **world, **master)
    assert codes == [1] and not modules & HEAVY


@pytest.mark.parametrize(
    ("more", "full", "code"),
    [
        *((["--dry-run"], "stdout", 1), (["--help"], "stdout", 1)),
        *((["sed=1", "--json"], "stderr", 2), (["sed=1", "--json"], "stdout", 2)),
    ],
)
def test_output_that_cannot_be_written_is_named(tmp_path, more, full, code):
    """The run directory is not to blame."""
    command = [sys.executable, "02_compress.py", "--run-dir", str(tmp_path / "run"), *more]
    other = "stderr" if full == "stdout" else "stdout"
    with open("/dev/full", "w") as device:
        streams = {full: device, other: subprocess.PIPE}
        done = subprocess.run(command, cwd=ROOT, **streams, text=True)
    assert done.returncode == code
    if other == "stdout":
        assert json.loads(done.stdout)["what"].startswith("unknown key sed")
        return
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 4, done.stderr
    expected = "stdout cannot be written" if code == 1 else "unknown key sed"
    assert expected in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_have_one_shape(script):
    """A docstring, the stage's body, and a call of `run_stage` with a stage of the table; of
    `run_parts`, if the stage has parts; of `run_session`, if it makes nothing."""
    text = (ROOT / f"{script}.py").read_text()
    tree = ast.parse(text)
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {"execute", "main"} <= functions and 20 <= len(text.splitlines()) <= 80
    assert (ast.get_docstring(tree) or "").startswith(f"Stage {script[:2]}: ")
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    runner, plan, show = ("run_stage", "plan_stage", "show_plan")
    if STAGES[script].parts:
        runner, plan = "run_parts", "plan_export"
    if script == "06_chat":
        runner, plan, show = "run_session", "plan_chat", "show"
    (call,) = [node for node in calls if ast.unparse(node.func) == runner]
    assert [ast.unparse(argument) for argument in call.args[2:6]] == [
        *("argv", "execute", plan, show)
    ]
    assert script in STAGES and f'"{script}"' in text


def test_commands_in_a_fix_repeat_what_names_the_run(tmp_path, capsys):
    """Else the command would redo another run: here that of the default config."""
    run_dir = tmp_path / "a run"
    config = ["--config", str(ROOT / "configs/tiny.yaml"), "--run-dir", str(run_dir), "seed=7"]
    assert load_script("04_eval").main([*config, "--json"]) == 1
    words = shlex.join(config)
    shown = json.loads(capsys.readouterr().out)["fix"]
    assert f"python 02_compress.py {words}" in shown, shown


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["--dryrun"], "did you mean --dry-run?"),
        (["--rundir=x", "seed=1"], "did you mean --run-dir?"),
        (["-json"], "did you mean --json?"),
        (["--quick"], "see python 01_health.py --help"),
        (["--gpu", "--json"], "see python 01_health.py --help"),
    ],
)
def test_an_option_that_is_not_known_is_told_the_nearest_one(words, fix, capsys):
    assert load_script("01_health").main(words) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"fix:      {fix}"


def test_a_command_without_its_config_is_told_to_name_the_run(tmp_path, capsys, monkeypatch):
    """Else it would be advised to compress the model of the default config."""
    monkeypatch.chdir(tmp_path)
    assert load_script("04_eval").main([]) == 1
    fix = capsys.readouterr().err.splitlines()[-1]
    assert "pass --config and --run-dir of the run, as for its other stages; for gpt-oss" in fix


@pytest.mark.parametrize(
    ("text", "completed"),
    [
        ("run python 02_compress.py --force", "run python 02_compress.py --config c --force"),
        (
            "python 02_compress.py, then python 03_finetune.py",
            "python 02_compress.py --config c, then python 03_finetune.py --config c",
        ),
        ("python 05_export.py --config other.yaml", "python 05_export.py --config other.yaml"),
        (
            "python 02_compress.py --force, or pass another --run-dir",
            "python 02_compress.py --config c --force, or pass another --run-dir",
        ),
        ("see python 03_finetune.py --help", "see python 03_finetune.py --help"),
        ("python my_02_data.py", "python my_02_data.py"),
    ],
)
def test_which_commands_are_completed(text, completed):
    assert complete_commands(text, ["--config", "c"]) == completed
    assert complete_commands(text, []) == text
