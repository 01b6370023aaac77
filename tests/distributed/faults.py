"""Ranks that fail in different ways."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from sparselong.parallel.collectives import sum_over_ranks
from sparselong.parallel.mesh import build_mesh
from sparselong.processes.watch import watch_ranks

TIMEOUT_SECONDS = 4.0


def fail(how: str, which: int, folder: Path) -> str:
    """Exchange until rank `which` fails, and return this rank's error message.

    Ranks write stderr to `folder`, so that the output of a rank ended from outside is available.
    """
    rank = dist.get_rank()
    # Any rank may notice a timeout first; in "hangs, seen by itself" only the late rank can.
    patience = TIMEOUT_SECONDS * (3 if "itself" in how and rank != which else 1)
    sys.stderr = (folder / f"{rank}.txt").open("w", buffering=1)
    mesh = build_mesh(dist.get_world_size())
    try:
        with watch_ranks(patience, silence_seconds=2.0, beat_seconds=0.2):
            for n in range(200):
                float(sum_over_ranks(torch.ones(1), mesh.world_group, "test"))
                if rank == which and n == 10:
                    break_down(how)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def break_down(how: str) -> None:
    if how == "raises":
        raise ValueError("boom")
    if how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
