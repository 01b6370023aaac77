"""Starts the parts of a benchmark over several GPUs: one process for each, with a time-out.

A part that fails or hangs is ended with all its processes, and the others go on; what it has
written until then counts. A process finds rank and peers in the environment, as under torchrun, and
its settings in `--settings`.
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
from pathlib import Path
from typing import Any


def make_waves(turns: list[tuple[int, bool]], gpus: int) -> list[list[tuple[int, bool]]]:
    """Parts that fit beside each other on the machine run at the same time, on other GPUs."""
    waves: list[list[tuple[int, bool]]] = []
    for turn in turns:
        if not waves or sum(degree for degree, _ in waves[-1]) + turn[0] > gpus:
            waves.append([])
        waves[-1].append(turn)
    return waves


def run_wave(wave: list[tuple[int, bool]], args: argparse.Namespace, script: str) -> list:
    """Each turn with its rows, and whether it came to its end."""
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
    """The processes of one part, one for each GPU from `first_gpu` on."""
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


def finish(processes: list, deadline: float) -> bool:
    """Whether all ended well by then; otherwise they are ended."""
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
