"""GPU hours and cost of a stage over all its sessions."""

import json
from types import SimpleNamespace

import pytest

from sparselong.config import load
from sparselong.errors import StageError
from sparselong.finetune.watching import Clock, begin_session, note_session, spent, sum_sessions
from tests.conftest import ROOT


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock that a test sets: `now` in seconds."""
    made = SimpleNamespace(now=1000.0)
    stand_in = SimpleNamespace(time=lambda: made.now, monotonic=lambda: made.now)
    monkeypatch.setattr(spent, "time", stand_in)
    monkeypatch.setattr("sparselong.finetune.watching.clock.time", stand_in)
    return made


def summed(folder, *overrides: str) -> tuple[float | None, float | None]:
    found = sum_sessions(folder, load(ROOT / "configs/tiny.yaml", list(overrides)))
    return found["gpu_hours"], found["cost"]


PRICES = "cost.per_gpu_hour={H200: 3.0, A100: 1.0}"


def test_sessions_add_up_and_idle_time_between_them_does_not_count(tmp_path, clock):
    begin_session(tmp_path, 4)
    note_session(tmp_path, "NVIDIA H200")
    clock.now += 1800
    note_session(tmp_path)
    clock.now += 86_400  # killed, and continued on another machine the next day
    begin_session(tmp_path, 2)
    note_session(tmp_path, "NVIDIA A100-SXM4-80GB")
    clock.now += 3600
    note_session(tmp_path)
    assert summed(tmp_path, PRICES) == (4.0, 2 * 3.0 + 2 * 1.0)
    assert summed(tmp_path, "cost.per_gpu_hour=2") == (4.0, 8.0)
    assert summed(tmp_path, "cost.per_gpu_hour={H200: 3.0}") == (4.0, None)
    assert summed(tmp_path) == (4.0, None)


def test_a_processor_takes_no_gpu_hours(tmp_path, clock):
    begin_session(tmp_path, 0)
    clock.now += 3600
    note_session(tmp_path)
    assert summed(tmp_path, "cost.per_gpu_hour=2") == (0, None)


def test_the_time_is_noted_during_training_but_not_at_every_step(tmp_path, clock):
    begin_session(tmp_path, 1)
    callback = Clock(tmp_path)
    for _ in range(7):
        clock.now += 10
        callback.on_step_end(None, None, None)
    (session,) = json.loads((tmp_path / "spent.json").read_text())["sessions"]
    assert session["seconds"] == 60
    Clock(None).on_step_end(None, None, None)


def test_a_damaged_record_is_refused_and_a_missing_one_is_no_session(tmp_path, clock):
    note_session(tmp_path)
    assert summed(tmp_path) == (0, None)
    (tmp_path / "spent.json").write_text('{"sessions"')
    with pytest.raises(StageError, match=r"spent\.json cannot be read"):
        begin_session(tmp_path, 1)
