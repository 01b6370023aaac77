"""A stage with parts: each is done, resumed, redone and recorded for itself."""

import argparse
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from sparselong.errors import StageError
from sparselong.provenance import describe_files
from sparselong.run import Choice, Part, Stage, read_manifest, run_parts, run_stage

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
    told = capsys.readouterr().err
    assert "made with other options\nexpected: --to a --kind y\nfound:    --to a --kind x" in told
    assert "move the directory elsewhere to keep it" in told
    assert make(write, "--make", "b", "--kind", "y") == 0  # options are a part's
    assert make(write, "--make", "a", "--kind", "y", "--force") == 0
    folder = tmp_path / "run/05_export"
    assert {path.name for path in folder.iterdir()} == {"a", "b"}
    (folder / "a").rename(tmp_path / "kept")
    assert make(write, "--make", "a", "--kind", "x") == 0


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


@pytest.mark.parametrize("other", [["--kind", "y"], ["calibration.samples=3"]], ids=" ".join)
@pytest.mark.parametrize("finished", [True, False])
def test_a_dry_run_refuses_what_the_run_would(make, capsys, other, finished):
    def begin(stage: Stage) -> None:
        write(stage)
        raise StageError("it broke", "", "", "")

    assert make(write if finished else begin, "--make", "a") == (not finished)
    capsys.readouterr()
    told = []
    for more in ([], ["--dry-run"]):
        assert make(bug, *other, "--make", "a", *more) == 1
        told.append(capsys.readouterr().err)
    assert told[0] == told[1] and "/a holds " in told[0]
    assert make(bug, *other, "--make", "a", "--dry-run", "--force") == 0
    assert make(bug, "--make", "a", "--dry-run") == 0


def test_a_dry_run_refuses_a_persons_directory(make, tmp_path, capsys):
    (tmp_path / "run/05_export/a").mkdir(parents=True)
    (tmp_path / "run/05_export/a/weights.bin").write_text("a person's")
    assert make(bug, "--make", "a", "--dry-run") == 1
    assert "was not written by a stage" in capsys.readouterr().err


def told_command(capsys) -> list[str]:
    """Return the arguments of the command that the last message tells to run, after the run's."""
    last = capsys.readouterr().err.splitlines()[-1]
    command = re.search(r"python 05_export\.py --config \S+ --run-dir \S+ (--to .*?--force)", last)
    assert last.startswith("fix:") and command, last
    return shlex.split(command[1])


def damage(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


def cut(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format_version": 3}')


def age(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2}))


def unmake(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "made_from": {"02_compress": "0"}}))


def edit_other(folder: Path) -> None:
    (folder.parent / "b/config.json").write_text("another")


def edit_options(folder: Path) -> None:
    for name in ("manifest.json", "started.json"):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "options": {"kind": "y"}}))


def unfinish(folder: Path) -> None:
    edit_options(folder)
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    "change",
    [damage, cut, age, unmake, edit_other, edit_options, unfinish],
    ids=lambda c: c.__name__,
)
def test_the_command_that_a_message_prints_names_the_part_and_runs(make, tmp_path, capsys, change):
    def write_and_read(stage: Stage) -> None:
        write(stage)
        stage.inputs = [stage.run_dir / "05_export/b/config.json"] if stage.part == "a" else []

    kind = ["--kind", "x y"]
    assert make(write_and_read, "--make", "b", "a", *kind) == 0
    change(tmp_path / "run/05_export/a")
    capsys.readouterr()
    assert make(bug, "--make", "a", *kind) == 1
    command = told_command(capsys)
    assert command == ["--to", "a", *kind, "--force"]
    made = []

    def note(stage: Stage) -> None:
        made.append(stage.part)
        write(stage)

    assert make(note, "--make", *command[1:]) == 0 and made == ["a"]
    assert make(bug, "--make", "a", *kind) == 0


def test_without_anything_readable_the_command_still_names_the_part(make, tmp_path, capsys):
    assert make(write, "--make", "a") == 0
    for name in ("manifest.json", "started.json"):
        (tmp_path / "run/05_export/a" / name).write_text("[]")
    assert make(bug, "--make", "a") == 1
    assert told_command(capsys) == ["--to", "a", "--force"]


@pytest.mark.parametrize("finished", [True, False])
def test_a_copy_of_another_part_is_not_this_one(make, tmp_path, capsys, finished):
    def leave(stage: Stage) -> None:
        write(stage)
        if not finished:
            raise StageError("it broke", "", "", "")

    assert make(leave, "--make", "b") == (not finished)
    shutil.copytree(tmp_path / "run/05_export/b", tmp_path / "run/05_export/a")
    for more in ([], ["--dry-run"]):
        assert make(bug, "--make", "a", *more) == 1
        told = capsys.readouterr().err
        assert ("found:    that of b" if finished else "found:    --to b") in told
        assert "/run --to a --kind x --force" in told
    assert make(write, "--make", "a", "--force") == 0


@pytest.mark.parametrize(
    "change", [{"options": 3}, {"options": {"kind": 3}}, {"outputs": [3]}, {"format_version": 2}]
)
def test_a_damaged_manifest_is_told_and_not_read(make, tmp_path, change):
    assert make(write, "--make", "a") == 0
    path = tmp_path / "run/05_export/a/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(StageError, match="damaged|another version"):
        read_manifest(tmp_path / "run", "05_export", "a")


@pytest.mark.parametrize("place", ["run", "run/05_export", "run/05_export/a"])
def test_files_have_names_in_the_run_also_if_a_directory_is_a_link(make, tmp_path, place):
    """To another disk, for example."""
    (tmp_path / "disk").mkdir()
    path = tmp_path / place
    if path.exists():
        shutil.move(path, tmp_path / "disk")
        path.symlink_to(tmp_path / "disk" / path.name)
    else:
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(tmp_path / "disk")
    assert make(write, "--make", "a") == 0
    manifest = read_manifest(tmp_path / "run", "05_export", "a") or {}
    assert [row["path"] for row in manifest["outputs"]] == ["05_export/a/config.json"]
    (path / "a" if place == "run/05_export" else path).joinpath("notes.txt").touch()
    assert make(write, "--make", "a", "--force") == 0
    assert make(bug, "--make", "a") == 0


@pytest.mark.parametrize("change", ["flip", "remove", "touch"])
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_result_that_was_damaged_is_not_up_to_date(make, tmp_path, capsys, change, more):
    assert make(write, "--make", "a", "b") == 0
    path = tmp_path / "run/05_export/a/config.json"
    if change == "flip":
        path.write_text("b")  # as many bytes
    elif change == "remove":
        path.unlink()
    os.utime(path if path.exists() else path.parent, (1, 1))
    assert make(bug, "--make", "b", "a", *more) == (change != "touch")
    if change != "touch":
        told = capsys.readouterr()
        assert "a/config.json has changed since 05_export/a recorded it" in told.err
        assert "/run --to a --kind x --force" in told.err
    assert make(write, "--make", "a", "--force") == 0
    assert make(bug, "--make", "a", *more) == 0


OWN = {
    "mxfp4": {"model-00001-of-00001.safetensors", "config.json", "tokenizer.json"},
    "adapter": {"adapter_config.json", "adapter_model.safetensors.partial"},
    "gguf": {"model.gguf", "model.gguf.partial"},
    "ollama": {"model.gguf", "Modelfile"},
    "hub": {"README.md"},
}


@pytest.mark.parametrize("part", OWN)
@pytest.mark.parametrize("finished", [True, False])
def test_force_keeps_a_persons_files(make, tmp_path, capsys, part, finished):
    def leave(stage: Stage) -> None:
        for name in OWN[part]:
            (stage.dir / name).write_text("a stage's")
            stage.outputs.append(stage.dir / name)
        if part == "mxfp4":  # the base's licence, as the export records it
            (stage.dir / "LICENSE").write_text("a stage's")
            rows = describe_files([stage.dir / "LICENSE"], stage.dir)
            (stage.dir / "written.json").write_text(json.dumps({"files": rows}))
            stage.outputs.append(stage.dir / "LICENSE")
        if not finished:
            raise StageError("it broke", "", "", "")

    assert make(leave, "--make", part) == (not finished)
    folder = tmp_path / "run/05_export"
    theirs = {".env", "README.md", "model-notes.txt"} - OWN[part]
    for name in theirs:
        (folder / part / name).write_text("a person's")
    assert make(lambda stage: None, "--make", part, "--force") == 0
    kept = {path.name: path.read_text() for path in (folder / f"{part}.kept-1").iterdir()}
    assert kept == dict.fromkeys(theirs, "a person's")
    assert f"{len(theirs)} files that 05_export did not write" in capsys.readouterr().err
