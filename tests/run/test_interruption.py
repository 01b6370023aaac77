"""A signal is reported as one, whatever a library makes of the exception that it raises."""

import os
import signal

import pytest

from sparselong.errors import StageError
from sparselong.run import Stage, interruptible, read_manifest, run_stage
from tests.conftest import ROOT

NUMBERS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}


@pytest.fixture(autouse=True)
def heard():
    """Let SIGHUP be heard although nohup may have started pytest."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def swallow(number: int) -> None:
    """Signal this process and swallow the exception, as C code may do."""
    try:
        os.kill(os.getpid(), number)
    except KeyboardInterrupt:
        return
    raise AssertionError("no KeyboardInterrupt")


def run(run_dir, execute, *more: str) -> int:
    arguments = ["--config", str(ROOT / "configs/tiny.yaml"), "--run-dir", str(run_dir), *more]
    return run_stage("02_compress", "", arguments, execute, lambda c, r, n: {}, str)


def raise_after(number: int, error: BaseException | None):
    def execute(stage: Stage) -> None:
        swallow(number)
        if error is not None:
            raise error

    return execute


@NUMBERS
@pytest.mark.parametrize(
    "error",
    [
        ValueError("could not determine the shape of object type 'UntypedStorage'"),
        StageError("a file is damaged", "x", "y", "download it again"),
        OSError(28, "No space left on device"),
        SystemExit(3),
        None,
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_a_signal_has_become_is_an_interruption(tmp_path, capsys, number, error):
    before = {each: signal.getsignal(each) for each in NAMES}
    assert run(tmp_path / "run", raise_after(number, error)) == 1
    told = capsys.readouterr().err
    assert told.startswith("error:    02_compress was interrupted\n") and "Traceback" not in told
    assert f"found:    {NAMES[number]}\n" in told and len(told.splitlines()) == 4
    assert read_manifest(tmp_path / "run", "02_compress") is None
    log = (tmp_path / "run/02_compress/log.txt").read_text()
    assert "was interrupted" in log and (error is None or type(error).__name__ in log)
    assert {each: signal.getsignal(each) for each in NAMES} == before


@pytest.mark.parametrize("link", ["from None", "from it", "inside"])
def test_an_explanation_made_from_the_interruption_stays(tmp_path, capsys, link):
    better = StageError("03 was interrupted at step 5", "the end", "SIGTERM", "go on")

    def execute(stage: Stage) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt as signalled:
            if link == "inside":
                raise better  # noqa: B904
            raise better from (None if link == "from None" else signalled)

    assert run(tmp_path / "run", execute) == 1
    assert capsys.readouterr().err.startswith("error:    03 was interrupted at step 5\n")


def test_without_a_signal_failures_are_what_they_were(tmp_path, capsys):
    def fail(stage: Stage) -> None:
        raise ValueError("a fault")

    with pytest.raises(ValueError, match="a fault"):
        run(tmp_path / "run", fail)


def test_a_block_inside_another_reports_its_signal():
    """Stage 03's ranks train in a block of their own."""
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"), interruptible():
        with interruptible():
            swallow(signal.SIGTERM)
            raise StageError("the trainer ended with signal SIGTERM", "x", "y", "z")


def test_ignored_signals_stay_ignored(monkeypatch):
    """Nohup ignores SIGHUP."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible() as heard:
            os.kill(os.getpid(), signal.SIGHUP)
        assert heard.name is None
    finally:
        signal.signal(signal.SIGHUP, previous)
