"""06_chat.py in a pseudo-terminal, in two processes that share a model."""

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT


def followers(process: subprocess.Popen) -> list[int]:
    """Return the processes that a program has started."""
    path = Path(f"/proc/{process.pid}/task")
    return [int(pid) for task in path.iterdir() for pid in (task / "children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def await_end(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, "a rank outlives rank 0"
        time.sleep(0.05)


@pytest.mark.parametrize("end", ["\x04", "kill"])
def test_ctrl_c_ends_the_answer_and_the_terminal_s_end_ends_all(untrained_base, tmp_path, end):
    options = ["--run-dir", str(tmp_path / "run"), "--model", str(untrained_base)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "06_chat.py", "--config", str(ROOT / "configs/tiny.yaml"), *options,
         "expert_parallel_degree=2", "--context", "4000",
         "--max-new-tokens", "3000", "--show-thinking", "--temperature", "0"],
        stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, env=environment,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(slave)
    seen = b""

    def wait(text: bytes) -> None:
        nonlocal seen
        deadline = time.monotonic() + 90
        while text not in seen:
            ready, _, _ = select.select([master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} was not shown: {seen[-2000:]!r}"
            try:
                seen += os.read(master, 1 << 16)
            except OSError:  # the program has ended
                assert text in seen, seen[-2000:]
        seen = seen.split(text, 1)[1]

    try:
        wait(b"> ")
        pids = followers(process)
        assert len(pids) == 1
        os.write(master, b"Hi\n")
        wait(b"Hi\r\n")
        time.sleep(1)
        os.write(master, b"\x03")
        wait(b"(stopped)")
        wait(b"> ")
        if end == "kill":
            os.kill(pids[0], signal.SIGKILL)
            wait(b"rank 1 of 06_chat ended with signal SIGKILL")
        else:
            os.write(master, end.encode())
        assert process.wait(30) == (1 if end == "kill" else 0)
        await_end(pids)
    finally:
        process.kill()
        os.close(master)
