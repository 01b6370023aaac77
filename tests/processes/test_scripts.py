"""Numbered scripts as child processes: their document, their exit code, and their end."""

import os
import signal
import time
from pathlib import Path

import pytest

from sparselong.processes import run_script

SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
kind, note = sys.argv[1:3]
assert sys.argv[3:] == ["--json"]
if kind == "waits":
    def end(*_):
        Path(note).write_text("ended as asked")
        sys.exit(1)
    signal.signal(signal.SIGTERM, end)
    Path(note).write_text("waiting")
    time.sleep(60)
if kind != "silent":
    print(json.dumps({"status": kind}) if kind != "noise" else "[1]")
sys.exit({"failed": 2}.get(kind, 0))
"""


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.parametrize(
    ("kind", "code", "document"),
    [
        ("done", 0, {"status": "done"}),
        ("failed", 2, {"status": "failed"}),
        ("silent", 0, None),
        ("noise", 0, None),
    ],
)
def test_the_document_and_the_code_come_back(script, kind, code, document):
    assert run_script(script, [kind, "note"]) == (code, document)


def test_an_interruption_ends_the_script_as_a_signal_does(script, tmp_path):
    note = tmp_path / "note"

    def interrupt(number, frame):
        if note.exists():
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_script(script, ["waits", str(note)])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert note.read_text() == "ended as asked" and time.monotonic() - start < 50


def test_the_script_dies_with_the_process_that_started_it(script, tmp_path):
    note = tmp_path / "note"
    parent = os.fork()
    if parent == 0:
        run_script(script, ["waits", str(note)])
        os._exit(0)
    deadline = time.monotonic() + 30
    while not note.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert len(children) == 1
    while Path(f"/proc/{children[0]}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
