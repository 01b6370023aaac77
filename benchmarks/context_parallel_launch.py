"""Launch the parts of a multi-GPU benchmark: one process per GPU, with a timeout.

If a part fails or hangs, all its processes are killed and the other parts continue; the rows that
it has written are kept. Processes find their rank and peers in the environment, as under torchrun,
and their settings in `--settings`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def make_waves(turns: list[tuple[int, bool]], gpus: int) -> list[list[tuple[int, bool]]]:
    """Group parts into waves that run at the same time, each part on its own GPUs."""
    waves: list[list[tuple[int, bool]]] = []
    for turn in turns:
        if not waves or sum(degree for degree, _ in waves[-1]) + turn[0] > gpus:
            waves.append([])
        waves[-1].append(turn)
    return waves


def run_wave(wave: list[tuple[int, bool]], args: argparse.Namespace, script: str) -> list:
    """Run a wave; return each part with its rows, and whether it succeeded."""
    found, first_gpu, deadline = [], 0, time.monotonic() + args.timeout_seconds
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / f"{n}.json" for n in range(len(wave))]
        parts = []
        for (degree, peer), out in zip(wave, outs, strict=True):
            parts.append(start(degree, first_gpu, args, out, script, peer=peer))
            first_gpu += degree
        for turn, processes, out in zip(wave, parts, outs, strict=True):
            ended = finish(processes, deadline)
            rows = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
            found.append((turn, rows, ended))
    return found


def start(
    degree: int, first_gpu: int, args: argparse.Namespace, out: Path, script: str, **more: Any
) -> list:
    """Start the processes of one part, one per GPU from `first_gpu` on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    settings = vars(args) | more | {"out": str(out), "worker": True}
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(degree),
        "CUDA_VISIBLE_DEVICES": ",".join(str(first_gpu + n) for n in range(degree)),
    }
    if not settings["peer"]:
        environment["NCCL_P2P_DISABLE"] = "1"
    command = [sys.executable, script, "--settings", json.dumps(settings, default=str)]
    return [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(n), "LOCAL_RANK": str(n)},
            start_new_session=True,
        )
        for n in range(degree)
    ]


@contextmanager
def limit_multiprocessors(percent: int) -> Iterator[None]:
    """Let processes started in this block use only part of each GPU's multiprocessors.

    They share the GPUs through a server of CUDA's Multi-Process Service (MPS), which lives as long
    as the block. At 100 percent nothing is started.

    Raises:
        FileNotFoundError: `nvidia-cuda-mps-control` is missing.
        CalledProcessError: the server does not start.
    """
    if percent == 100:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        server = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        added = server | {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(percent)}
        subprocess.run(["nvidia-cuda-mps-control", "-d"], env=os.environ | server, check=True)
        os.environ.update(added)
        try:
            yield
        finally:
            subprocess.run(["nvidia-cuda-mps-control"], input=b"quit\n", check=True)
            for name in added:
                del os.environ[name]


def finish(processes: list, deadline: float) -> bool:
    """Return whether all processes succeed before the deadline; otherwise kill them."""
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if all(code == 0 for code in codes):
            return True
        if any(code not in (None, 0) for code in codes):
            break
        time.sleep(0.2)
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    print(f"exit codes {[process.wait() for process in processes]}", file=sys.stderr)
    return False
