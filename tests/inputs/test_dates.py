"""The date that a template renders: fixed once per run, recorded, and the same in every stage."""

import datetime
import json

import pytest

from sparselong.config import load
from sparselong.data import encode_files, rendering_date, run_date
from sparselong.errors import ConfigError, StageError
from sparselong.finetune import preview_line
from sparselong.model import load_tokenizer
from sparselong.run import Stage
from sparselong.run.directory import finish
from sparselong.run.stages import stage_hash
from tests.conftest import ROOT

DATED = "{{- 'Today is ' ~ strftime_now('%Y-%m-%d') ~ '. ' }}"
"""As the published template writes it; the demo's does not read the clock."""


@pytest.fixture
def dated(base):
    """The small base with a template that writes the date."""
    path = base / "chat_template.jinja"
    path.write_text(DATED + path.read_text())
    return base


@pytest.fixture
def on(monkeypatch):
    """Return a function that sets the clock's day."""

    def turn(day: str) -> None:
        today = staticmethod(lambda: datetime.date.fromisoformat(day))
        clock = type("Clock", (datetime.date,), {"today": today})
        monkeypatch.setattr(run_date.datetime, "date", clock)

    return turn


@pytest.fixture
def config(chat_file):
    def make(*more: str):
        return load(ROOT / "configs/tiny.yaml", [f"data.train={chat_file}", *more])

    return make


def first_text(config, run_dir, base) -> str:
    tokenizer = load_tokenizer(base)
    return tokenizer.decode(encode_files(config, run_dir, tokenizer).train[0][0])


def test_a_run_keeps_its_date_on_another_day(config, dated, tmp_path, on):
    run_dir = tmp_path / "run"
    on("2026-01-31")
    text = first_text(config(), run_dir, dated)
    assert text.startswith("Today is 2026-01-31. ")
    on("2026-02-01")
    assert first_text(config(), run_dir, dated) == text
    for path in sorted((run_dir / "data").rglob("*"), reverse=True):  # may be deleted and remade
        path.rmdir() if path.is_dir() else path.unlink()
    assert first_text(config(), run_dir, dated) == text
    assert first_text(config(), tmp_path / "other", dated).startswith("Today is 2026-02-01. ")


def test_a_key_sets_the_date_and_is_part_of_the_hash(config, dated, tmp_path, on):
    on("2026-02-01")
    text = first_text(config("data.date=1999-12-31"), tmp_path / "run", dated)
    assert text.startswith("Today is 1999-12-31. ")
    assert first_text(config("data.date=2000-01-01"), tmp_path / "run", dated) != text
    assert not (tmp_path / "run/date.txt").exists()
    names = [(), ("data.date=1999-12-31",), ("data.date=2000-01-01",)]
    assert len({stage_hash(config(*each), "02_compress") for each in names}) == 3


@pytest.mark.parametrize("value", ["yesterday", "2026-02-30", "2026", "31.01.2026", "", "20260131"])
def test_what_is_no_date_is_refused_by_key(config, value):
    with pytest.raises(ConfigError) as refusal:
        config(f"data.date={value}")
    assert "data.date" in str(refusal.value) and "2026-01-31" in refusal.value.fix
    assert "YYYY-MM-DD" in refusal.value.expected


def test_a_config_with_a_date_is_read_back(config):
    from sparselong.config import dump

    made = config("data.date=2026-01-31")
    assert made.data.date == datetime.date(2026, 1, 31)
    assert dump(made).count("2026-01-31") == 1


@pytest.mark.parametrize("content", ["", "31.01.2026\n", "2026-02-30", "\xff"])
def test_a_damaged_record_is_explained(config, tmp_path, content):
    (tmp_path / "date.txt").write_text(content)
    with pytest.raises(StageError) as refusal:
        rendering_date(config(), tmp_path)
    assert "date.txt" in refusal.value.what and "manifest.json" in refusal.value.fix


def test_the_manifest_names_the_date(config, tmp_path):
    stage = Stage("02_compress", config(), tmp_path, date=datetime.date(2026, 1, 31))
    stage.dir.mkdir()
    assert finish(stage, 1.0)["date"] == "2026-01-31"
    manifest = json.loads((stage.dir / "manifest.json").read_text())
    assert manifest["date"] == "2026-01-31"


def test_a_preview_shows_the_runs_date_and_fixes_none(config, dated, chat_file, tmp_path, on):
    on("2026-03-01")
    made = config(f"model.base={dated}")
    shown = preview_line(made, tmp_path, f"{chat_file}:1")["text"]
    assert "Today is 2026-03-01. " in shown and not (tmp_path / "date.txt").exists()
    (tmp_path / "date.txt").write_text("2026-01-31\n")
    assert "Today is 2026-01-31. " in preview_line(made, tmp_path, f"{chat_file}:1")["text"]


def test_a_date_that_changed_after_an_earlier_stage_is_refused(config, tmp_path):
    """Its tokens would be others: date.txt was removed, or edited, between two stages."""
    stage = Stage("04_eval", config(), tmp_path)
    stage.manifests = {"02_compress": {"date": "2026-01-31"}, "03_finetune": {}}
    stage.note_date(datetime.date(2026, 1, 31))
    assert stage.date == datetime.date(2026, 1, 31)
    with pytest.raises(StageError, match="since 02_compress read it") as refusal:
        stage.note_date(datetime.date(2026, 2, 1))
    assert "write 2026-01-31 into it" in refusal.value.fix
