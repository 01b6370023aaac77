"""A stage with parts: each is done, resumed, redone and recorded for itself."""

import argparse
import json
from pathlib import Path

import pytest

from sparselong.errors import StageError
from sparselong.run import Choice, Part, Stage, run_parts, run_stage

TINY = str(Path(__file__).resolve().parents[2] / "configs/tiny.yaml")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--make", nargs="+")
    parser.add_argument("--kind", default="x")
    parser.add_argument("--renew", action="store_true")


def choose(arguments: argparse.Namespace) -> list[Part]:
    options = {"kind": arguments.kind}
    more = {"is_renewed": arguments.renew, "takes_force": not arguments.renew}
    return [Part(name, ("02_compress",), options, **more) for name in arguments.make]


def write(stage: Stage) -> None:
    (stage.dir / "config.json").write_text(stage.part)
    stage.outputs = [stage.dir / "config.json"]


def fail_at_b(stage: Stage) -> None:
    if stage.part == "b":
        raise StageError("b failed", "", "", "try again")
    write(stage)


def bug(stage: Stage) -> None:
    raise AssertionError(f"{stage.part} was made again")


@pytest.fixture
def make(tmp_path):
    """Run parts in one run directory in which stage 02 is done; return the exit code."""
    common = ["--config", TINY, "--run-dir", str(tmp_path / "run")]
    assert run_stage("02_compress", "", common, write, lambda c, r, n: {}, str) == 0

    def make(execute, *arguments: str, check=lambda stages: None) -> int:
        choice, plan = Choice(add_options, choose), lambda stages: {"parts": len(stages)}
        argv = [*common, *arguments]
        return run_parts("05_export", "", argv, execute, plan, str, choice, check)

    return make


def test_a_part_that_fails_leaves_the_earlier_ones_done(make, tmp_path, capsys):
    folder = tmp_path / "run/05_export"
    assert make(fail_at_b, "--make", "a", "b", "c", "--json") == 1
    assert json.loads(capsys.readouterr().out)["what"] == "b failed"
    assert [(folder / name / "manifest.json").exists() for name in "abc"] == [True, False, False]
    assert "b failed" in (folder / "b/log.txt").read_text()
    assert "failed" not in (folder / "a/log.txt").read_text()
    made = []

    def note(stage: Stage) -> None:
        made.append(stage.part)
        write(stage)

    assert make(note, "--make", "a", "b", "c", "--json") == 0
    told = capsys.readouterr()
    assert made == ["b", "c"] and "05_export a is up to date" in told.err
    document = json.loads(told.out)
    assert list(document["parts"]) == ["a", "b", "c"]
    for name, manifest in document["parts"].items():
        assert (manifest["part"], manifest["options"]) == (name, {"kind": "x"})
        assert list(manifest["made_from"]) == ["02_compress"]
        (row,) = manifest["outputs"]
        assert row["path"] == f"05_export/{name}/config.json"
    assert make(bug, "--make", "a", "b", "c") == 0


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_part_that_is_renewed_replaces_its_own_files_unforced(make, tmp_path, force):
    folder = tmp_path / "run/05_export"
    assert make(write, "--make", "a") == 0
    (folder / "a/notes.txt").write_text("a person's")
    forced = []

    def note(stage: Stage) -> None:
        forced.append(stage.forced)
        write(stage)

    more = ["--make", "a", "--kind", "y", "--renew", *force]
    assert make(bug, *more, "--dry-run") == 0 and (folder / "a/notes.txt").exists()
    assert make(note, *more) == 0 and forced == [False]
    assert json.loads((folder / "a/manifest.json").read_text())["options"] == {"kind": "y"}
    assert [path.name for path in (folder / "a.kept-1").iterdir()] == ["notes.txt"]


def test_other_options_are_refused_and_forced(make, tmp_path, capsys):
    assert make(write, "--make", "a") == 0
    assert make(bug, "--make", "a", "--kind", "y") == 1
    assert "made with other options\nexpected: --kind y\nfound:    --kind x" in (
        capsys.readouterr().err
    )
    assert make(write, "--make", "b", "--kind", "y") == 0  # options are a part's
    assert make(write, "--make", "a", "--kind", "y", "--force") == 0
    left = {path.name for path in (tmp_path / "run/05_export").iterdir()}
    assert left == {"a", "b"}


def test_keys_of_stages_that_a_part_does_not_read_may_change(make):
    assert make(write, "--make", "a") == 0
    assert make(bug, "training.learning_rate=0.5", "--make", "a") == 0
    assert make(bug, "calibration.samples=3", "--make", "a") == 1


def test_all_parts_are_checked_before_the_first_one_begins(make, tmp_path):
    def check(stages: list[Stage]) -> None:
        assert [stage.part for stage in stages] == ["a", "b"]
        raise StageError("b cannot be", "", "", "")

    assert make(bug, "--make", "a", "b", check=check) == 1
    assert not (tmp_path / "run/05_export").exists()


def test_a_dry_run_plans_all_parts_and_changes_nothing(make, tmp_path, capsys):
    assert make(bug, "--make", "a", "b", "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"parts": 2}
    assert not (tmp_path / "run/05_export").exists()


def test_a_damaged_manifest_names_the_stages_script(make, tmp_path, capsys):
    assert make(write, "--make", "a") == 0
    (tmp_path / "run/05_export/a/manifest.json").write_text("[]")
    assert make(bug, "--make", "a") == 1
    assert "python 05_export.py" in capsys.readouterr().err
