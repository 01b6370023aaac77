"""06_chat.py in two processes that share a model; tests/web has its terminal."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from contextlib import suppress
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
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def alone(arguments, capsys) -> dict:
    """What one process answers."""
    options = [*arguments, *SAMPLED, "--prompt", "Hi", "--json"]
    assert load_script("06_chat").main(options) == 0
    return json.loads(capsys.readouterr().out)


def find_rank(run_dir: Path) -> int:
    """Return the process in which another rank of this run was started."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended meanwhile
            if f"sparselong.chat.rank\0{run_dir}".encode() in path.read_bytes():
                return int(path.parent.name)
    raise AssertionError("no other rank is running")


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
    arguments, environment, alone, forked_python, tmp_path
):
    process = subprocess.Popen(
        [forked_python, "06_chat.py", *arguments, TWO, "--serve", "--port", "0", "--json",
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
        os.kill(find_rank(tmp_path / "run"), signal.SIGKILL)
        _, told = process.communicate(timeout=60)
        assert process.returncode == 1
        assert b"rank 1 of 06_chat ended with signal SIGKILL" in told and b"Traceback" not in told
    finally:
        process.kill()
