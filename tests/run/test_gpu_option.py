"""`--gpu N`: one card, before anything asks CUDA; refused if it is not there or not enough."""

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from sparselong import registration
from sparselong.config import load
from sparselong.errors import ConfigError
from sparselong.processes.launch import find_world
from sparselong.run import parse_arguments
from tests.conftest import ROOT

TINY = ROOT / "configs/tiny.yaml"


@pytest.fixture
def machine(monkeypatch):
    """A machine with as many GPUs as a test says, by NVML."""
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that what a test sets is undone
        monkeypatch.delenv(name)

    def install(gpus: int | None) -> None:
        def count(pointer) -> int:
            pointer._obj.value = gpus
            return 0

        driver = SimpleNamespace(
            nvmlInit_v2=lambda: 0, nvmlShutdown=lambda: 0, nvmlDeviceGetCount_v2=count
        )

        def find(name: str):
            if gpus is None:
                raise OSError(f"{name}: cannot open shared object file")
            return driver

        monkeypatch.setattr(registration.ctypes, "CDLL", find)

    assert registration.ctypes is ctypes
    return install


def choose(number: int) -> None:
    parse_arguments("02_compress", "", ["--config", str(TINY), "--gpu", str(number)])


def test_it_is_numbered_as_in_nvidia_smi(machine):
    machine(4)
    choose(2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_it_is_one_of_the_visible_ones(machine, monkeypatch):
    machine(8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-9ab,7")
    choose(1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-9ab"
    assert "CUDA_DEVICE_ORDER" not in os.environ  # their numbers mean what they meant before


@pytest.mark.parametrize(
    ("gpus", "visible", "number", "found"),
    [
        (4, None, 4, "4 GPUs"),
        (4, None, -1, "4 GPUs"),
        (4, "0,1", 2, "CUDA_VISIBLE_DEVICES=0,1, 4 GPUs"),
        (4, "", 0, "CUDA_VISIBLE_DEVICES=, 4 GPUs"),
        (4, "-1", 0, "CUDA_VISIBLE_DEVICES=-1, 4 GPUs"),
        (4, "0,-1,1", 1, "CUDA_VISIBLE_DEVICES=0,-1,1, 4 GPUs"),
        (4, "0,7", 1, "CUDA_VISIBLE_DEVICES=0,7, 4 GPUs"),
        (None, "0,1", 1, "CUDA_VISIBLE_DEVICES=0,1, no NVIDIA driver, or no GPU"),
        (0, None, 0, "no NVIDIA driver, or no GPU"),
        (None, None, 0, "no NVIDIA driver, or no GPU"),
    ],
)
def test_one_that_is_not_there_is_refused(machine, monkeypatch, gpus, visible, number, found):
    machine(gpus)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ConfigError, match=f"--gpu {number} does not exist") as refused:
        choose(number)
    assert refused.value.found == found and refused.value.exit_code == 2
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


def test_several_processes_of_a_launcher_are_refused(machine, monkeypatch):
    machine(4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="names one GPU, but a launcher"):
        choose(0)


def test_a_run_of_more_processes_than_visible_gpus_is_refused_before_it_starts(machine):
    machine(4)
    choose(3)
    assert find_world(load(TINY)).size == 1
    with pytest.raises(ConfigError, match="2 processes need 2 GPUs") as refused:
        find_world(load(TINY, ["sequence_parallel_degree=2"]))
    assert "leave out --gpu" in refused.value.fix and "1: CUDA_VISIBLE_DEVICES=3" in str(
        refused.value
    )


def test_without_visible_gpus_processes_train_on_the_cpu(machine, monkeypatch):
    for visible in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert find_world(load(TINY, ["sequence_parallel_degree=2"])).size == 2


def test_a_script_refuses_it_in_four_lines():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "03_finetune.py", "--config", str(TINY), "--gpu", "0"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error:    --gpu 0 does not exist\n")
    assert len(done.stderr.splitlines()) == 4
