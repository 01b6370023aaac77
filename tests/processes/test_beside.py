"""Rank 0 in the stage's own process: the other ranks end with it, and it ends with them."""

import os
import signal
import threading
import time

import pytest

from sparselong.config import load
from sparselong.errors import StageError
from sparselong.processes import beside, process, watch
from sparselong.run import Stage, interruptible
from tests.conftest import ROOT

WAIT = "import time; time.sleep(60)"


@pytest.fixture
def stage(tmp_path) -> Stage:
    made = Stage("06_chat", load(ROOT / "configs/tiny.yaml"), tmp_path)
    made.dir.mkdir()
    return made


@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)


def test_the_ranks_know_each_other_and_end_with_the_block(stage, alone):
    """Their stdin is not this process's, and they are not in its session, which Ctrl-C ends."""
    tell = "import os, sys; print(*map(os.environ.get, ['RANK', 'WORLD_SIZE', 'MASTER_PORT']),"
    tell += " os.getsid(0) == os.getpid(), len(sys.stdin.read()))"
    with beside.working_beside(stage, ["-c", tell], 3):
        assert [os.environ[name] for name in ("RANK", "WORLD_SIZE")] == ["0", "3"]
        port = os.environ["MASTER_PORT"]
    assert "RANK" not in os.environ and "MASTER_PORT" not in os.environ
    for rank in (1, 2):
        log = (stage.dir / f"log.rank{rank}.txt").read_text()
        assert log == f"{rank} 3 {port} True 0\n"


@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt("Ctrl-C")])
def test_a_failure_of_the_block_is_its_own_and_stops_the_others(stage, alone, monkeypatch, error):
    monkeypatch.setattr("sparselong.processes.process._SETTLE_SECONDS", 0.1)
    begin = time.monotonic()
    with pytest.raises(type(error), match=str(error)):
        with beside.working_beside(stage, ["-c", WAIT], 2):
            raise error
    assert time.monotonic() - begin < 10


def test_a_killed_rank_ends_what_the_block_waits_for_and_is_named(stage, alone, monkeypatch):
    told = []
    monkeypatch.setattr(beside, "report_end", told.append)
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    previous = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StageError, match="rank 1 of 06_chat ended with signal SIGKILL"):
        with interruptible(), beside.working_beside(stage, ["-c", kill], 2):
            threading.Event().wait(30)
            pytest.fail("the block went on")
    assert told == [1] and signal.getsignal(signal.SIGTERM) == previous


@pytest.mark.parametrize("is_consequence", [False, True])
def test_the_first_cause_is_told(stage, alone, monkeypatch, is_consequence):
    """Of a rank's failure and this process's, the one that did not follow from the other."""
    monkeypatch.setattr(beside.os, "kill", lambda *_: None)
    fail = (
        "from pathlib import Path; from sparselong.processes import tell_failures; "
        "from sparselong.errors import StageError; "
        f"tell_failures(Path({str(stage.dir)!r}), 1); "
        f"raise StageError('theirs', 'x', 'y', 'z', consequence={not is_consequence})"
    )
    with pytest.raises(StageError, match="theirs" if is_consequence else "mine"):
        with beside.working_beside(stage, ["-c", fail], 2):
            while not (stage.dir / "failure.rank1.json").exists():
                time.sleep(0.05)
            raise StageError("mine", "x", "y", "z", consequence=is_consequence)


def test_an_end_is_reported_only_where_ranks_are_watched(monkeypatch):
    watch.report_end(1)
    seen = []

    class Watch:
        def report(self, *told):
            seen.append(told)

    monkeypatch.setattr(watch, "_current", Watch())
    watch.report_end(1)
    assert seen == [(1, "its process has ended")]


def test_the_block_begins_when_the_ranks_have_been_started(stage, alone, monkeypatch):
    """A child forked while this process loads libraries may end in the loader."""
    begun, make = [], process._Trainer.__init__

    def start_slowly(self, *given):
        time.sleep(0.3)
        begun.append("started")
        make(self, *given)

    monkeypatch.setattr(process._Trainer, "__init__", start_slowly)
    with beside.working_beside(stage, ["-c", ""], 3):
        begun.append("block")
    assert begun == ["started", "started", "block"]


def test_ranks_that_cannot_be_started_end_the_block(stage, alone, monkeypatch):
    def fail(*_):
        raise OSError("no more processes")

    monkeypatch.setattr(process._Trainer, "__init__", fail)
    with pytest.raises(OSError, match="no more processes"):
        with interruptible(), beside.working_beside(stage, ["-c", ""], 2):
            threading.Event().wait(30)
            pytest.fail("the block went on")
