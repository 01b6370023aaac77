"""Progress: lines for logs, a bar for terminals, and what a terminal's end does to a stage."""

import fcntl
import os
import pty
import re
import signal
import struct
import sys
import termios
import time
from pathlib import Path

import pytest

from sparselong.config import load
from sparselong.run import Stage, progress
from sparselong.run.log import add_to_log, remove_control
from sparselong.run.progress import Display
from tests.conftest import ROOT

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
STAGE = r"""
import os, sys, time
from pathlib import Path
from sparselong.run import progress, run_stage
progress.LINE_SECONDS = 0.0
def execute(stage):
    for number in range(1, 6):
        stage.report("layer", number, 5, f"loss {number}.5")
        stage.log(f"\x1b[31mmessage {number}\x1b[0m\r")
        sys.stderr.write("from a library\n")
        while number == 2 and wait and not Path("go").exists():
            time.sleep(0.02)
    stream = sys.stderr.buffer
    stage.metrics["dropped"] = getattr(stream, "raw", stream).failed
wait = sys.argv.pop(1) == "wait"
if sys.argv.pop(1) == "nohup":
    import signal
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
sys.exit(run_stage("02_compress", "", None, execute, lambda c, r, n: {"stage": n}, str))
"""


BAR = r"""
import sys, time
from pathlib import Path
from sparselong.run.progress import Display
with Display() as display:
    display.show("layer", 1, 9, "loss 2.5, 1,234 tokens/s")
    time.sleep(1.1)
    begun = time.process_time()
    time.sleep(2.0)
    Path("used").write_text(str((time.process_time() - begun) / 2.0))
print("done in", file=sys.stderr)
"""


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def stage(tmp_path) -> Stage:
    made = Stage("02_compress", load(ROOT / "configs/tiny.yaml"), tmp_path)
    made.dir.mkdir()
    return made


def test_lines_are_few_and_say_how_long_it_will_take(clock, stage, capsys):
    with stage.display:
        for number in range(1, 101):
            clock[0] += 1.0
            stage.report("layer", number, 100, f"loss {number}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "layer 11/100, loss 11, 89 s left"
    assert lines[-1] == "layer 100/100, loss 100" and len(lines) == 10
    log = (stage.dir / "log.txt").read_text().splitlines()
    assert [line[20:] for line in log] == lines


def test_a_resumed_run_estimates_from_where_it_began(clock, capsys):
    display = Display()
    display.show("step", 90, 1000)
    clock[0] += 100.0
    assert display.show("step", 100, 1000) == "step 100/1,000, 2.5 h left"
    assert display.show("step", 3, 1000) is None  # the next model, from its own beginning
    clock[0] += 100.0
    assert display.show("step", 4, 1000) == "step 4/1,000, 27.7 h left"


def test_each_thing_has_its_own_lines_and_what_is_done_soon_has_none(clock, capsys):
    display = Display()
    assert [display.show("step", 0, 9), display.show("batch", 0, 2)] == [None, None]
    clock[0] += 6.0
    assert [display.show("step", 1, 9), display.show("batch", 2, 2)] == [None, None]
    clock[0] += 6.0
    assert display.show("step", 2, 9) == "step 2/9, 42 s left"
    assert display.show("batch", 0, 2) is None
    clock[0] += 11.0
    assert [display.show("batch", 2, 2), display.show("batch", 0, 2)] == ["batch 2/2", None]
    clock[0] += 1.0
    assert display.show("step", 9, 9) == "step 9/9"
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_a_log_has_no_control_characters(tmp_path):
    add_to_log(tmp_path / "log.txt", "a\x1b[31mred\x1b[0m\rb\tc\nd\x07\x9b1m\x1b]0;title\x07e")
    text = (tmp_path / "log.txt").read_text()
    assert not CONTROL.search(text) and text[20:] == "aredb\tc\nde\n"
    assert remove_control("é → 漢") == "é → 漢"


class Terminal:
    """Python code, by default that of STAGE, in a pseudo-terminal of its own."""

    def __init__(self, folder: Path, *words: str, code: str = STAGE, **settings: str):
        self.folder, self.seen = folder, b""
        self.process, self.master = pty.fork()
        if not self.process:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # pytest may run under nohup
            os.chdir(folder)
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", **settings}
            environment.pop("NO_COLOR", None)
            arguments = ["--config", str(ROOT / "configs/tiny.yaml"), "--run-dir", "run"]
            command = [sys.executable, "-c", code, *words, *arguments]
            os.execve(sys.executable, command, environment)
        size = struct.pack("HHHH", 24, 100, 0, 0)
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, size)

    def read_until(self, text: bytes) -> None:
        while text not in self.seen:
            try:
                self.seen += os.read(self.master, 65536)
            except OSError:  # the other side is closed
                assert text in self.seen, self.seen.decode(errors="replace")

    def end(self, seconds: float = 30.0) -> int:
        """Return the exit code."""
        deadline = time.monotonic() + seconds
        while True:
            done, status = os.waitpid(self.process, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            assert time.monotonic() < deadline, "the stage has not ended"
            time.sleep(0.02)

    @property
    def log(self) -> str:
        return (self.folder / "run/02_compress/log.txt").read_text()


def test_a_terminal_has_a_bar_and_messages_above_it(tmp_path):
    terminal = Terminal(tmp_path, "wait", "hup")
    terminal.read_until(b"2.5")
    (tmp_path / "go").touch()
    terminal.read_until(b"done in")
    assert terminal.end() == 0
    shown = terminal.seen.decode()
    assert "━" in shown and "2/5" in re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert "left" in shown and "message 5" in shown and "from a library" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is visible again
    assert "layer 5/5" not in shown  # a line is for logs
    assert "layer 5/5, loss 5.5\n" in terminal.log and "message 5\n" in terminal.log
    assert not CONTROL.search(terminal.log)


@pytest.mark.parametrize("setting", [{"TERM": "dumb"}, {"COLUMNS": "0"}], ids=str)
def test_where_no_bar_can_be_drawn_there_are_lines_and_all_messages(tmp_path, setting):
    terminal = Terminal(tmp_path, "go", "hup", **setting)
    terminal.read_until(b"done in")
    assert terminal.end() == 0
    assert b"layer 5/5, loss 5.5" in terminal.seen and "━".encode() not in terminal.seen
    assert all(f"message {number}".encode() in terminal.seen for number in range(1, 6))


def test_a_stage_goes_on_when_its_terminal_is_closed_under_nohup(tmp_path):
    terminal = Terminal(tmp_path, "wait", "nohup")
    terminal.read_until(b"2.5")
    os.close(terminal.master)
    (tmp_path / "go").touch()
    assert terminal.end() == 0
    manifest = (tmp_path / "run/02_compress/manifest.json").read_text()
    assert '"dropped": true' in manifest  # after the first failure nothing was written any more
    assert "message 5" in terminal.log and "layer 5/5" in terminal.log


def test_a_closed_terminal_interrupts_a_stage_that_has_no_nohup(tmp_path):
    terminal = Terminal(tmp_path, "wait", "hup")
    terminal.read_until(b"2.5")
    os.close(terminal.master)
    assert terminal.end() == 1
    assert "was interrupted" in terminal.log and "SIGHUP" in terminal.log
    assert not (tmp_path / "run/02_compress/manifest.json").exists()


def test_progress_costs_less_than_a_hundredth_of_a_step(clock, stage):
    """The shortest step that was measured on a GPU takes 251 ms (20b, 4,096 tokens)."""
    begun = time.process_time()
    with stage.display:
        for number in range(1, 1001):
            clock[0] += 0.25
            stage.report("training step", number, 1000, "loss 2.5, 1,234 tokens/s")
    assert (time.process_time() - begun) / 1000 < 0.01 * 0.251


def test_a_bar_that_is_drawn_costs_less_than_a_hundredth_of_the_time(tmp_path):
    """It shares the interpreter with stages 02 and 04."""
    terminal = Terminal(tmp_path, code=BAR)
    terminal.read_until(b"done in")
    assert terminal.end() == 0 and "━".encode() in terminal.seen
    assert 0.0 < float((tmp_path / "used").read_text()) < 0.01
