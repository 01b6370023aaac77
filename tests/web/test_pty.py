"""The terminal in a pseudo-terminal: keys, Ctrl-C, a window that changes its size, encodings."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

import pytest

from sparselong.chat.terminal import COMMANDS
from tests.conftest import ROOT

SCRIPT = ROOT / "tests/web/scripted_terminal.py"


class Person:
    """Types into a program in a pseudo-terminal and reads what it shows."""

    def __init__(self, folder, environment: dict[str, str], columns: int = 80):
        self.master, slave = pty.openpty()
        self.resize(columns)
        self.seen = b""
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder)],
            stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, start_new_session=True,
            env=os.environ | {"TERM": "xterm", "PYTHONPATH": str(ROOT)} | environment,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)

    def resize(self, columns: int) -> None:
        size = struct.pack("HHHH", 24, columns, 0, 0)
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, size)

    def type(self, text: str, encoding: str = "utf-8") -> None:
        self.seen = b""
        os.write(self.master, text.encode(encoding))

    def wait(self, text: str, seconds: float = 15, encoding: str = "utf-8") -> str:
        """Return what was shown since the last typing, once `text` is in it."""
        deadline = time.monotonic() + seconds
        while text not in self.shown(encoding):
            left = deadline - time.monotonic()
            assert left > 0, f"{text!r} was not shown: {self.shown(encoding)[-2000:]!r}"
            if select.select([self.master], [], [], left)[0]:
                try:
                    self.seen += os.read(self.master, 1 << 16)
                except OSError:  # the program has ended
                    assert text in self.shown(encoding), self.shown(encoding)[-2000:]
        return self.shown(encoding)

    def shown(self, encoding: str) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.seen.decode(encoding, "replace"))

    def end(self) -> int:
        """Leave at the prompt."""
        self.wait("\n> ")
        self.type("\x04")
        return self.process.wait(10)


@pytest.fixture
def person(tmp_path) -> Iterator[Person]:
    found = Person(tmp_path, {"LC_ALL": "C.UTF-8"})
    found.wait("> ")
    yield found
    if found.process.poll() is None:
        os.killpg(found.process.pid, signal.SIGKILL)
    os.close(found.master)


def test_every_command(person, tmp_path):
    person.type("Hi\n")
    person.wait("Hello there!")
    typed = {
        "/help": "/settings NAME=VALUE",
        "/stats": "prompt_tokens: 7",
        "/retry": "Hello there!",
        "/system Be brief.": "Be brief.",
        "/reasoning high": "reasoning high",
        "/reasoning": "thinking shown",
        "/settings temperature=0.5": "temperature=0.5",
        "/save talk": "saved to",
        "/clear": "a new conversation",
        "/load talk": "user: Hi",
        "/load": "talk",
    }
    assert {name.split()[0] for name in typed} == set(COMMANDS) - {"/exit"}
    for line, shown in typed.items():
        person.type(f"{line}\n")
        person.wait(shown)
        person.wait("\n> ")
    assert (tmp_path / "conversations/talk.json").exists()
    person.type("/exit\n")
    assert person.process.wait(10) == 0


def test_ctrl_c_stops_the_answer_ctrl_d_the_program(person):
    person.type("long\n")
    person.wait("line 3")
    person.type("\x03")
    person.wait("(stopped)")
    person.wait("\n> ")  # before it, Ctrl-C would still be for the answer
    person.type("Hi\n")
    person.wait("Hello there!")
    person.wait("\n> ")
    person.type("half a line")
    person.wait("half a line")
    time.sleep(0.3)  # Python's readline notices Ctrl-C only while it waits for a key
    person.type("\x03")
    person.wait("Ctrl-D ends)\r\n> ")
    person.type("Hi\n")
    person.wait("Hello there!")
    assert person.end() == 0


def test_a_window_that_changes_its_size_loses_nothing(person):
    person.type("long\n")
    person.wait("line 3")
    for columns in (30, 120, 12, 80):
        person.resize(columns)
        time.sleep(0.1)
    shown = person.wait("line 59", 30)
    assert all(f"line {n}" in shown for n in range(60)) and "naïve 日本 bold" in shown
    assert person.end() == 0


def test_several_lines_history_and_editing(person):
    person.type("one\\\n")
    person.wait(". ")
    person.type("two\n")
    person.wait("Hello there!")
    person.type('"""\n')
    person.wait(". ")
    person.type('/not a command\n\n"""\n')
    person.wait("Hello there!")
    person.wait("\n> ")
    person.type("\x1b[A\x1b[A\x1b[A\x1b[A\n")  # arrow up, to "two"
    assert "two" in person.wait("Hello there!")
    assert person.end() == 0


@pytest.mark.parametrize(("locale", "encoding"), [("C", "ascii"), ("POSIX", "latin-1")])
def test_terminals_without_utf_8(tmp_path, locale, encoding):
    settings = {"LC_ALL": locale, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0",
                "PYTHONCOERCECLOCALE": "0"}  # fmt: skip
    person = Person(tmp_path, settings)
    person.wait("> ")
    person.type("long\n")
    wanted = "naïve 日本".encode(encoding, "backslashreplace").decode(encoding)
    person.wait(wanted, 30, encoding)
    person.wait("line 59", 30, encoding)
    assert person.end() == 0
    os.close(person.master)


def test_a_closed_terminal_ends_the_program(tmp_path):
    person = Person(tmp_path, {"LC_ALL": "C.UTF-8"})
    person.wait("> ")
    person.type("long\n")
    person.wait("line 1")
    os.close(person.master)
    person.process.wait(15)
