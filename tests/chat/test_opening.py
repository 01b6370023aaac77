"""How many processes open a model, and when the endpoint on a shared one ends."""

import threading
from pathlib import Path

import pytest
from fastapi import FastAPI

from sparselong.chat import opening
from sparselong.chat.command import check_processes
from sparselong.chat.server import bind, serve
from sparselong.config import load
from sparselong.errors import ConfigError, StageError
from sparselong.processes import sharing
from tests.conftest import ROOT

BIG = ROOT / "configs/gpt-oss-120b-4x3090.yaml"
GIB = 1 << 30


@pytest.fixture
def torchrun(monkeypatch):
    """Set the variables of a launcher."""

    def launch(size: int, here: int) -> None:
        values = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": here}
        for name, value in {**values, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}.items():
            monkeypatch.setenv(name, str(value))

    return launch


@pytest.mark.parametrize(
    ("gpus", "gpu_gib", "host_gib", "found"),
    [
        (1, 140, 64, (1, "gpu")),
        (4, 140, 64, (1, "gpu")),  # one GPU is enough
        (4, 23, 64, (4, "gpu")),
        (4, 23, 512, (4, "gpu")),  # faster than host memory
        (1, 23, 128, (1, "host")),
    ],
)
def test_processes_are_started_for_a_model_that_fits_on_no_gpu_alone(
    monkeypatch, gpus, gpu_gib, host_gib, found
):
    monkeypatch.setattr(opening.torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(sharing.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sharing, "available_bytes", lambda: gpu_gib * GIB)
    monkeypatch.setattr(sharing, "host_memory", lambda: (0, host_gib * GIB))
    assert opening._plan(load(BIG)) == found


def test_a_model_that_fits_nowhere_is_refused(monkeypatch):
    monkeypatch.setattr(opening.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(sharing.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sharing, "available_bytes", lambda: 23 * GIB)
    monkeypatch.setattr(sharing, "host_memory", lambda: (0, 16 * GIB))
    with pytest.raises(StageError, match="does not fit"):
        opening._plan(load(BIG))


def test_without_gpus_the_config_says_how_many():
    config = load(ROOT / "configs/tiny.yaml", ["expert_parallel_degree=2"])
    assert opening._plan(config) == (2, "gpu")
    assert opening._plan(load(ROOT / "configs/tiny.yaml")) == (1, "gpu")


def test_torchrun_s_processes_are_used(torchrun):
    torchrun(2, 2)
    config = load(ROOT / "configs/tiny.yaml")
    check_processes(config)
    assert opening._plan(config)[0] == 2
    check_processes(load(ROOT / "configs/tiny.yaml", ["expert_parallel_degree=2"]))
    with pytest.raises(ConfigError, match=r"(?s)2 processes would share.*nproc_per_node=4"):
        check_processes(load(ROOT / "configs/tiny.yaml", ["expert_parallel_degree=4"]))
    torchrun(4, 2)
    with pytest.raises(ConfigError, match="several machines"):
        check_processes(config)


def test_the_endpoint_ends_when_its_model_cannot_answer_any_more():
    over, told = threading.Event(), []

    def tell(address: str) -> None:
        told.append(address)
        threading.Timer(0.3, over.set).start()

    serve(FastAPI(), bind("127.0.0.1", 0), tell, over.is_set)
    assert over.is_set() and told[0].startswith("http://127.0.0.1:")


def test_of_two_that_open_models_for_one_port_the_second_is_told():
    """Neither listens while it opens its model, so both can bind the port."""
    first = bind("127.0.0.1", 0)
    port = first.getsockname()[1]
    second = bind("127.0.0.1", port)
    with first:
        first.listen()
        with pytest.raises(StageError, match=f"127.0.0.1:{port} cannot be bound"):
            serve(FastAPI(), second, print)
        with pytest.raises(StageError, match=f"127.0.0.1:{port} cannot be bound"):
            bind("127.0.0.1", port)


def test_a_named_directory_is_planned_by_its_own_shape(untrained_base: Path):
    source = opening.Source(untrained_base)
    config = load(BIG)
    assert opening._as_base(config, "base", source) is config
    found = opening._as_base(config, str(untrained_base), source)
    assert found.model.base == str(untrained_base.resolve())
    assert opening._plan(found) == (1, "gpu")
