"""A fork sees, prints and returns what Python itself does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.kernels.run_interpreted import INTERPRETED

ENVIRONMENT = {**os.environ, **INTERPRETED}
SHOW = """
import json, os, sys
own = {k: v for k, v in os.environ.items() if k != "LC_CTYPE"}
mask = os.umask(0)
seen = [sys.argv, sys.path[:2], os.getcwd(), mask, __name__, own, sys.stdin.read()]
print(json.dumps(seen), os.path.exists("seen"), "__file__" in globals())
print("to stderr", file=sys.stderr)
"""
ENDS = {
    "returns": "print('almost done', end='')",
    "code": "import sys; sys.exit(259)",
    "message": "import sys; sys.exit('what is wrong')",
    "error": "import atexit; atexit.register(print, 'last'); [][0]",
    "interrupted": "raise KeyboardInterrupt",
    "killed": "import os; os.kill(os.getpid(), 9)",
    "waits": """
import threading, time
threading.Thread(target=lambda: time.sleep(0.1) or print("waited")).start()
""",
}


def run(python: str, command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = ENVIRONMENT | {"RANK": "7", "NAME": "größe", "PYTHONPATH": f"{folder}/more"}
    given = {"input": "some text", "capture_output": True, "text": True, "umask": 0o27}
    return subprocess.run([python, *command], cwd=folder, env=environment, **given)


@pytest.mark.parametrize("kind", [["-c", SHOW], ["-m", "shown"], ["shown.py"], ["-u", "in/a.py"]])
def test_a_run_sees_what_python_shows_it(kind, forked_python, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("shown.py", "in/a.py"):
        (tmp_path / name).write_text(SHOW)
    command = [*kind, "--an-option", "größe"]
    ours, wanted = (run(each, command, tmp_path) for each in (forked_python, sys.executable))
    assert wanted.returncode == 0 and "some text" in wanted.stdout
    assert (ours.returncode, ours.stdout, ours.stderr) == (0, wanted.stdout, wanted.stderr)


@pytest.mark.parametrize("end", ENDS)
def test_a_run_ends_as_python_does(end, forked_python, tmp_path):
    command = ["-c", ENDS[end]]
    ours, wanted = (run(each, command, tmp_path) for each in (forked_python, sys.executable))
    assert (ours.returncode, ours.stdout) == (wanted.returncode, wanted.stdout)
    assert ours.stderr.splitlines()[-1:] == wanted.stderr.splitlines()[-1:]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_reaches_the_run(number, forked_python):
    text = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    command = [forked_python, "-c", text]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=pipe, stderr=pipe) as process:
        assert process.stdout
        run_id = int(process.stdout.readline())
        process.send_signal(number)
        assert process.wait(20) == -number
    deadline = time.monotonic() + 20
    while Path(f"/proc/{run_id}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_packages_are_imported_under_the_commands_environment(forked_python):
    """And our own modules by each run."""
    text = (
        "import json, sys; from triton import knobs; "
        "print(json.dumps([knobs.runtime.interpret, 'sparselong' in sys.modules, 'torch' in "
        "sys.modules, sys.flags.dev_mode]))"
    )
    for more in ({}, {"PYTHONDEVMODE": "1"}):
        command = [forked_python, "-c", text]
        found = subprocess.check_output(command, env=ENVIRONMENT | more)
        assert json.loads(found) == [True, False, True, bool(more)]
