"""benchmarks/sharded_full.py in miniature: two processes on a CPU agree with one."""

import argparse
import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import sharded_full
from tests.distributed.pool import free_port

TINY = {"shape": "tiny", "layers": 2, "lengths": [24], "processes": 2, "timeout_seconds": 120}


def test_nothing_is_measured_without_two_gpus(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(sys, "argv", ["sharded_full.py"])
    sharded_full.main()
    assert "needs two CUDA devices: nothing measured" in capsys.readouterr().out


def test_two_processes_train_as_one(monkeypatch, forked_python):
    def start(processes, first_gpu, args, out, script, **case):
        """As `context_parallel_launch.start`, without the seconds of imports."""
        settings = json.dumps(vars(args) | case | {"out": str(out)})
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        where["WORLD_SIZE"] = str(processes)
        command = [forked_python, script, "--settings", settings]
        return [
            subprocess.Popen(command, env=os.environ | where | {"RANK": str(rank)})
            for rank in range(processes)
        ]

    monkeypatch.setattr(sharded_full, "start", start)
    rows, difference = sharded_full.compare(argparse.Namespace(**TINY), "fsdp2")
    assert 0 < difference < sharded_full.TOLERANCES["tiny"]
    losses = [row["value"] for row in rows if row["metric"] == "loss"]
    assert len(losses) == 10 and losses[5:] == pytest.approx(losses[:5], rel=1e-5)
    assert losses[4] < losses[0]
