"""The examples for several machines are correct shell, and pass what torchrun and stage 03 take.

They run with a torchrun, srun and scontrol that only write down how they were called.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from sparselong.config import Config, load
from sparselong.processes import find_world
from sparselong.run import parse_arguments
from tests.conftest import ROOT

FOLDER = ROOT / "examples/several_machines"
TOOLS = {
    "torchrun": 'printf "%s\\0" "$@" > arguments',
    "srun": 'while [[ $1 == --* ]]; do echo "$1" >> srun_options; shift; done; "$@"',
    "scontrol": "echo node7; echo node8",
}
SLURM = {"NNODES": 2, "GPUS_ON_NODE": 4, "JOB_ID": 93, "JOB_NODELIST": "node[7-8]"}
CALLS = {
    "torchrun.sh": (["lora.r=8"], {"HOST": "node7", "RUN_DIR": "/shared/my run"}),
    "slurm.sbatch": (["/shared/my run", "lora.r=8"], {f"SLURM_{k}": v for k, v in SLURM.items()}),
}


def write_tool(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A repository with nothing but the examples, and an environment of these tools."""
    shutil.copytree(FOLDER, tmp_path / "examples/several_machines")
    for name, text in TOOLS.items():
        write_tool(tmp_path / ".venv/bin" / name, text)
    (tmp_path / ".venv/bin/activate").write_text(f'PATH="{tmp_path}/.venv/bin:$PATH"\n')
    return tmp_path


def sbatch_options(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", path.read_text(), re.MULTILINE))


def call(checkout: Path, name: str, given: list[str], variables: dict) -> list[str]:
    """Run an example as a machine would; return torchrun's arguments."""
    slurm = {"SLURM_SUBMIT_DIR": checkout, "SLURM_CPUS_PER_TASK": 16}
    values = {key: str(value) for key, value in {**slurm, **variables}.items()}
    script = checkout / "examples/several_machines" / name
    subprocess.run(["bash", script, *given], cwd=checkout, env={**os.environ, **values}, check=True)
    return (checkout / "arguments").read_text().split("\0")[:-1]


def test_every_file_is_tested():
    assert {path.name for path in FOLDER.iterdir()} == CALLS.keys()


@pytest.mark.parametrize("name", CALLS)
def test_the_shell_reads_it(name):
    subprocess.run(["bash", "-n", FOLDER / name], check=True)
    ended = subprocess.run(["bash", FOLDER / name], capture_output=True, text=True, check=False)
    assert ended.returncode != 0 and "for example" in ended.stderr  # says what is missing


@pytest.mark.parametrize("name", CALLS)
def test_torchrun_and_the_stage_take_its_options(checkout, name, monkeypatch):
    given = get_args_parser().parse_args(call(checkout, name, *CALLS[name]))
    assert (given.nnodes, given.nproc_per_node) == ("2", "4")
    assert (given.rdzv_backend, given.rdzv_endpoint) == ("c10d", "node7:29500")
    assert given.rdzv_id != "none" and (ROOT / given.training_script).exists()
    monkeypatch.chdir(ROOT)
    arguments = parse_arguments("03_finetune", "", given.training_script_args)
    assert arguments.run_dir == Path("/shared/my run")
    config = load(arguments.config, arguments.overrides)
    assert isinstance(config, Config) and config.lora.r == 8
    variables = {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}
    for key, value in {**variables, "MASTER_ADDR": "node7", "MASTER_PORT": 29500}.items():
        monkeypatch.setenv(key, str(value))
    assert find_world(config).local == {5: 1}


def test_slurm_starts_one_torchrun_on_each_machine(checkout):
    options = sbatch_options(FOLDER / "slurm.sbatch")
    assert options.items() >= {"nodes": "2", "ntasks-per-node": "1", "gpus-per-node": "4"}.items()
    call(checkout, "slurm.sbatch", *CALLS["slurm.sbatch"])
    lines = (checkout / "srun_options").read_text().split()
    assert lines == ["--cpus-per-task=16", "--kill-on-bad-exit=1"]
