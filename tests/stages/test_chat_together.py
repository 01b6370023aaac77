"""06_chat.py in two processes that share a model: rank 0 has the terminal and the endpoint."""

import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
import urllib.request
from pathlib import Path

import pytest

from tests.conftest import ROOT, load_script

TWO = "expert_parallel_degree=2"
SAMPLED = ["--seed", "3", "--max-new-tokens", "12"]


@pytest.fixture
def arguments(untrained_base, tmp_path) -> list[str]:
    options = ["--run-dir", str(tmp_path / "run"), "--model", str(untrained_base)]
    return ["--config", str(ROOT / "configs/tiny.yaml"), *options]


@pytest.fixture
def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm"}


@pytest.fixture
def alone(arguments, capsys) -> dict:
    """What one process answers."""
    options = [*arguments, *SAMPLED, "--prompt", "Hi", "--json"]
    assert load_script("06_chat").main(options) == 0
    return json.loads(capsys.readouterr().out)


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


@pytest.mark.parametrize("launcher", ["python", "torchrun"])
def test_a_sampled_answer_is_that_of_one_process(
    arguments, environment, alone, forked_python, launcher
):
    """The question comes from rank 0's stdin, which the other process must not read."""
    words = ["06_chat.py", *arguments, *SAMPLED, "--json"]
    command = [forked_python, *words, TWO]
    if launcher == "torchrun":
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command, environment["PYTHON_EXEC"] = [sys.executable, *start, *words], forked_python
    done = subprocess.run(
        command, input=b"Hi", capture_output=True, cwd=ROOT, env=environment, timeout=170
    )
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads(done.stdout)
    assert found["message"] == alone["message"] and found["seed"] == 3
    assert found["usage"]["new_tokens"] == alone["usage"]["new_tokens"]
    assert b"opened in 2 processes" in done.stderr and b"shared by 2" in done.stderr


def test_the_endpoint_goes_on_after_a_client_left_and_ends_with_a_killed_rank(
    arguments, environment, alone
):
    process = subprocess.Popen(
        [sys.executable, "06_chat.py", *arguments, TWO, "--serve", "--port", "0", "--json",
         "--context", "4000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=environment,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        body = {"model": first["model"], "messages": [{"role": "user", "content": "Hi"}]}

        def ask(**more):
            request = urllib.request.Request(
                f"{first['address']}/v1/chat/completions",
                json.dumps(body | more).encode(),
                {"Content-Type": "application/json"},
            )
            return urllib.request.urlopen(request, timeout=60)

        with ask(stream=True, max_tokens=3000) as leaving:
            assert leaving.readline().startswith(b"data: ")
        with ask(seed=3, max_tokens=12) as response:
            message = json.load(response)["choices"][0]["message"]
        assert message["content"] == alone["message"]["content"]
        (follower,) = followers(process)
        os.kill(follower, signal.SIGKILL)
        _, told = process.communicate(timeout=60)
        assert process.returncode == 1
        assert b"rank 1 of 06_chat ended with signal SIGKILL" in told and b"Traceback" not in told
    finally:
        process.kill()


@pytest.mark.parametrize("end", ["\x04", "kill"])
def test_ctrl_c_ends_the_answer_and_the_terminal_s_end_ends_all(arguments, environment, end):
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "06_chat.py", *arguments, TWO, "--context", "4000",
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
