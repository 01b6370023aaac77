"""Python without the seconds of imports, for tests that start the same scripts again and again.

A script of ours imports torch, transformers and often Axolotl for 5 to 12 seconds before it does
anything. Here a process imports them once and forks for each run. The runs share nothing else: our
own modules, which the tests are about, are imported by each run.

Packages read the environment while they are imported. So a process is shared only by commands of
the same environment, except for the variables that `FREE` matches.

Not for tests of what comes before or during the imports, or of signals and processes: those need
Python itself. What the kernel knows of a run differs: its parent is not who started it, and
`ps` shows its command line for the stand-in, which is killed with it.
"""

from __future__ import annotations

import json
import os
import re
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
MOST_BYTES = 1 << 18
FREE = re.compile(
    "PYTEST_CURRENT_TEST|PYTHONPATH|PYTHON_EXEC|MASTER_(ADDR|PORT)|TORCH(ELASTIC|_NCCL)_.*|"
    "((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE|NAME)|COLUMNS|LINES|LLM_COMPRESSOR_LOG_LEVEL|"
    "TQDM_DISABLE|HF_XET_HIGH_PERFORMANCE|HF_HUB_ENABLE_HF_TRANSFER"
)
"""Variables that no package below reads while it is imported, or only for progress bars and
downloads: packages set those three in the tests' own process. Each run finds its own PYTHONPATH."""
AXOLOTL = ("axolotl.cli.train", "axolotl.train", "axolotl.core.builders.causal", "trl", "peft")
TRITON = ("torch", "torch._dynamo", "triton")
STAGES = (
    "transformers.models.gpt_oss.modeling_gpt_oss",
    *("accelerate", "matplotlib.pyplot", "lm_eval.evaluator"),
)


def packages_of(command: dict) -> tuple[str, ...]:
    """Return what the process that runs a command has imported."""
    arguments = command["arguments"]
    if "TRITON_INTERPRET" in command["environment"]:
        return TRITON
    named = arguments[1] if arguments[0] in ("-m", "-c") else ""
    if "axolotl" in named or named == "sparselong.finetune.rank":
        return AXOLOTL
    return STAGES


@contextmanager
def serving() -> Iterator[str]:
    """Yield the path of a stand-in for Python that works inside the block."""
    with tempfile.TemporaryDirectory(prefix="sparselong-python-") as name:
        folder = Path(name)
        (folder / "real").symlink_to(sys.executable)  # a `#!` line cannot have spaces
        program = folder / "python"
        text = (FOLDER / "python.py").read_text(encoding="utf-8")
        program.write_text(f"#!{folder}/real -IS\n{text}", encoding="utf-8")
        program.chmod(0o755)
        command = [sys.executable, str(FOLDER / "servers.py"), str(folder / "socket")]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True) as server:
            assert server.stdout and server.stdout.readline() == b"ready\n"
            yield str(program)


def serve(path: str) -> None:
    """Pass commands to processes that have imported their packages, until stdin is closed."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen(100)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    parents: dict[str, socket.socket] = {}
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        message, streams, *_ = socket.recv_fds(connection, MOST_BYTES, 3)
        command = json.loads(message)
        environment = {k: v for k, v in command["environment"].items() if not FREE.fullmatch(k)}
        packages = packages_of(command)
        key = json.dumps([packages, environment], sort_keys=True)
        if key not in parents:
            parents[key] = start_parent(packages, environment)
        descriptors = [*streams, connection.detach()]
        socket.send_fds(parents[key], [message], descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def start_parent(packages: tuple[str, ...], environment: dict[str, str]) -> socket.socket:
    """Start a process that imports the packages, and return the way to send it commands."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        subprocess.Popen(
            [sys.executable, str(FOLDER / "parent.py"), str(theirs.fileno()), *packages],
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
    return ours


if __name__ == "__main__":
    serve(sys.argv[1])
