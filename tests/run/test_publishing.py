"""The page about a run is written whenever a stage is done, and never decides its result."""

from pathlib import Path

import pytest

from sparselong.errors import StageError
from sparselong.report import write_page
from sparselong.run import Choice, Part, Stage, read_manifest, run_parts, run_stage

TINY = str(Path(__file__).resolve().parents[2] / "configs/tiny.yaml")


def work(stage: Stage) -> None:
    stage.metrics["figure"] = 3


def fail(stage: Stage) -> None:
    raise StageError("it broke", "whole", "broken", "mend it")


def refuse(run_dir: Path) -> Path:
    raise StageError("no page", "a page", "none", "mend it")


def bug(run_dir: Path) -> Path:
    raise ZeroDivisionError("in the page")


def run(tmp_path, execute, page, *more, name="02_compress") -> int:
    arguments = ["--config", TINY, "--run-dir", str(tmp_path / "run"), *more]
    return run_stage(name, "", arguments, execute, lambda c, r, n: {"stage": n}, str, page=page)


def test_the_page_is_written_after_each_stage_and_again_if_it_is_up_to_date(tmp_path, capsys):
    page = tmp_path / "run/report.html"
    assert run(tmp_path, work, write_page, "--dry-run") == 0 and not page.exists()
    assert run(tmp_path, fail, write_page) == 1 and not page.exists()
    assert run(tmp_path, work, write_page) == 0 and "02_compress" in page.read_text()
    assert f"all finished stages on one page: {page}" in capsys.readouterr().err
    page.unlink()
    assert run(tmp_path, fail, write_page) == 0 and page.exists()
    assert "one page" in (tmp_path / "run/02_compress/log.txt").read_text()


@pytest.mark.parametrize(
    ("page", "told"),
    [(refuse, "error:    no page"), (bug, "ZeroDivisionError: in the page")],
)
def test_a_page_that_fails_is_told_and_the_stage_is_done(tmp_path, capsys, page, told):
    assert run(tmp_path, work, page, "--json") == 0
    assert read_manifest(tmp_path / "run", "02_compress") is not None
    printed = capsys.readouterr()
    assert '"status": "done"' in printed.out and told in printed.err
    assert "warning: 02_compress is done, but the page about the run" in printed.err
    assert told in (tmp_path / "run/02_compress/log.txt").read_text()
    assert ("Traceback" in printed.err) is (page is bug)


def test_each_part_is_on_the_page(tmp_path):
    assert run(tmp_path, work, None) == 0
    choice = Choice(lambda parser: None, lambda a: [Part(n, ("02_compress",), {}) for n in "ab"])
    arguments = ["--config", TINY, "--run-dir", str(tmp_path / "run")]
    assert run_parts("05_export", "", arguments, work, lambda stages: {}, str, choice,
                     lambda stages: None, page=write_page) == 0  # fmt: skip
    text = (tmp_path / "run/report.html").read_text()
    assert "05_export/a" in text and "05_export/b" in text


def test_stages_that_repeat_are_executed_again(tmp_path):
    done = []
    for _ in range(2):
        assert run(tmp_path, done.append, None, name="01_health") == 0
        assert run(tmp_path, done.append, None) == 0
    assert [stage.name for stage in done] == ["01_health", "02_compress", "01_health"]
