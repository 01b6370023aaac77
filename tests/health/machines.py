"""Machines as records of facts, and the health check's verdicts on them."""

from pathlib import Path

from sparselong.config import schema as config_module
from sparselong.health.check import check
from sparselong.health.machine import Disk, Gpu, Machine, Torch
from sparselong.health.packages import Package
from sparselong.health.rows import Row
from sparselong.health.sources import Source
from sparselong.health.stage import plan_for
from tests.conftest import ROOT

GIB = 2**30


def load(name: str, *overrides: str):
    return config_module.load(ROOT / f"configs/{name}.yaml", overrides)


def gpu(index=0, name="NVIDIA GeForce RTX 3090", gib=24.0, free=23.6, capability=(8, 6)):
    return Gpu(index, name, capability, int(gib * GIB), int(free * GIB), "4.0 x16")


def machine(gpus=(), **changes) -> Machine:
    """Describe a well-equipped machine with these GPUs."""
    gpus = tuple(gpus)
    cuda = "13.0" if gpus else None
    facts = {
        "python": (3, 11, 9),
        "own_python": False,
        "packages": (Package("torch", "2.13.0", "2.13.0+cpu"), Package("rich", "15.0.0", "15.0.0")),
        "torch": Torch("2.13.0", cuda, len(gpus), bool(gpus), True),
        "driver": "580.95.05" if gpus else None,
        "nvcc": None,
        "gpus": gpus,
        "cores": 8,
        "host_total_bytes": 64 * GIB,
        "host_available_bytes": 60 * GIB,
        "run_disk": Disk(Path("/data"), 900 * GIB, 1),
        "hub_disk": Disk(Path("/data"), 900 * GIB, 1),
        "run_dir_bytes": 0,
        "base": Source("base model", "openai/gpt-oss-120b", "here", "in the hub cache"),
        "data": (Source("training data", "x.jsonl", "here", "file of 9 bytes"),),
    }
    return Machine(**{**facts, **changes})


FOUR_3090 = machine(gpu(index) for index in range(4))
H200 = machine([gpu(0, "NVIDIA H200", 140.0, 139.0, (9, 0))])
NONE = machine()


def judge(config, facts: Machine) -> dict[str, Row]:
    rows = check(config, facts, plan_for(config, facts))
    assert all(row.fix for row in rows if row.status != "ok")
    assert len({row.check for row in rows}) == len(rows)
    return {row.check: row for row in rows}


def failures(config, facts: Machine) -> set[str]:
    return {row.check for row in judge(config, facts).values() if row.status == "fail"}


BIG, SMALL, TINY = load("gpt-oss-120b-4x3090"), load("gpt-oss-20b-1x3090"), load("tiny")
ALONE = "sequence_parallel_degree=1"
