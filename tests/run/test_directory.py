"""The run directory: a manifest marks completion, one process at a time, hashes decide."""

import errno
import json
import os
import re
import signal
from pathlib import Path

import pytest

from sparselong.errors import StageError
from sparselong.files import copy_atomically, write_atomically
from sparselong.run import Stage, read_manifest, run_stage

TINY = ["--config", str(Path(__file__).resolve().parents[2] / "configs/tiny.yaml")]


def run(tmp_path, execute, *more, name="02_compress"):
    arguments = [*TINY, "--run-dir", str(tmp_path / "run"), *more]
    return run_stage(name, "test", arguments, execute, lambda c, r, n: {"stage": n}, str)


def write_output(stage: Stage) -> None:
    path = stage.dir / "out.bin"
    path.write_bytes(b"abc")
    stage.outputs = [path]
    stage.metrics["figure"] = 3


def write_other(stage: Stage) -> None:
    write_output(stage)
    stage.outputs[0].write_bytes(b"abd")


def bug(stage: Stage) -> None:
    raise ZeroDivisionError


def fail(stage: Stage) -> None:
    raise StageError("it broke", "whole", "broken", "mend it")


def begin(stage: Stage) -> None:
    """Fail once there is something to keep."""
    (stage.dir / "work").mkdir(exist_ok=True)
    (stage.dir / "work/layer-0.json").write_text("{}")
    fail(stage)


def test_a_stage_leaves_config_and_manifest(tmp_path, capsys):
    assert run(tmp_path, write_output, "seed=7", "--json") == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest == read_manifest(tmp_path / "run", "02_compress")
    assert manifest["status"] == "done" and manifest["metrics"] == {"figure": 3}
    assert manifest["seed"] == 7 and manifest["versions"]["python"]
    path = tmp_path / "run/02_compress/out.bin"
    assert manifest["outputs"] == [
        {
            "path": "02_compress/out.bin",
            "bytes": 3,
            "mtime_ns": path.stat().st_mtime_ns,
            "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        }
    ]
    assert "seed: 7" in (tmp_path / "run/config.yaml").read_text()
    assert manifest["config"]["seed"] == 7 and manifest["config"]["training"]["save_steps"]


def test_a_rerun_does_nothing_and_force_repeats_the_stage(tmp_path, capsys):
    assert run(tmp_path, write_output) == 0
    assert capsys.readouterr().out.startswith("02_compress done in ")
    os.utime(tmp_path / "run/02_compress/manifest.json", (0, 86400 * 365))
    assert run(tmp_path, fail) == 0
    assert re.match(r"02_compress was done on 197[01]-\d\d-\d\d .*, in ", capsys.readouterr().out)
    assert run(tmp_path, fail, "--force") == 1
    assert read_manifest(tmp_path / "run", "02_compress") is None
    kept = tmp_path / "run/02_compress.replaced"
    assert (kept / "out.bin").read_bytes() == b"abc", (
        "the old result must be kept until there is a new one"
    )
    assert run(tmp_path, fail, "--force") == 1 and (kept / "out.bin").exists()
    assert run(tmp_path, write_output) == 0 and not kept.exists()


def test_another_config_is_refused_and_nothing_is_lost(tmp_path, capsys):
    assert run(tmp_path, write_output) == 0
    assert run(tmp_path, write_output, "shared_dense.sparsity=none") == 1
    told = capsys.readouterr().err
    assert "of another config" in told
    assert 'expected: shared_dense.sparsity="none"\n' in told
    assert 'found:    shared_dense.sparsity="2:4"\n' in told
    assert (tmp_path / "run/02_compress/out.bin").exists()
    words = f"--config {tmp_path}/run/config.yaml --run-dir {tmp_path}/run"
    assert f"pass what it was made with: {words}, or another --run-dir to keep it" in told
    assert run(tmp_path, fail, "training.max_steps=7") == 0  # stage 02 does not read this key
    assert run(tmp_path, write_output, "shared_dense.sparsity=none", "--force") == 0


def test_unfinished_work_of_another_config_is_refused(tmp_path, capsys):
    assert run(tmp_path, begin) == 1
    assert run(tmp_path, write_output, "calibration.samples=5") == 1
    assert "unfinished work" in capsys.readouterr().err
    assert run(tmp_path, write_output) == 0


def test_a_stage_that_was_refused_before_its_work_does_not_block_the_corrected_config(tmp_path):
    """The file is what stage 02 writes first: it must be made again for the other config."""
    folder = tmp_path / "run/02_compress"

    def refuse(stage: Stage) -> None:
        (stage.dir / "base.json").write_text("{}")
        fail(stage)

    assert run(tmp_path, refuse) == run(tmp_path, refuse) == 1
    assert (folder / "log.txt").read_text().count("it broke") == 2
    assert run(tmp_path, write_output, "calibration.samples=5") == 0
    assert not (folder / "base.json").exists()
    assert "it broke" not in (folder / "log.txt").read_text()
    manifest = read_manifest(tmp_path / "run", "02_compress")
    assert manifest is not None and manifest["config"]["calibration"]["samples"] == 5


def test_expected_failures_take_four_lines_and_no_traceback(tmp_path, capsys):
    assert run(tmp_path, fail, "--json") == 1
    captured = capsys.readouterr()
    assert [line.split()[0] for line in captured.err.splitlines()] == [
        *("error:", "expected:", "found:", "fix:")
    ]
    assert json.loads(captured.out)["status"] == "failed"
    assert "found:    broken" in (tmp_path / "run/02_compress/log.txt").read_text()
    assert read_manifest(tmp_path / "run", "02_compress") is None


def test_unexpected_failures_keep_their_traceback(tmp_path):
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, bug)
    assert "ZeroDivisionError" in (tmp_path / "run/02_compress/log.txt").read_text()


@pytest.mark.parametrize(
    ("failure", "place"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "model.safetensors"), "model.safet"),
        (
            OSError(errno.EDQUOT, "über das Kontingent"),
            "to ",
        ),  # recognized by its number, not its text
        (RuntimeError("I/O error: No space left on device (os error 28)"), "to "),  # safetensors
    ],
)
def test_a_full_disk_is_explained(tmp_path, capsys, failure, place):
    def fill(stage: Stage) -> None:
        raise failure

    assert run(tmp_path, fill) == 1
    assert f"could not write {place}" in capsys.readouterr().err


def test_a_full_disk_names_the_file_that_is_copied_to(tmp_path, capsys, monkeypatch):
    def fill(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def copy(stage: Stage) -> None:
        (tmp_path / "source.bin").write_bytes(b"abc")
        copy_atomically(tmp_path / "source.bin", stage.dir / "copy.bin")

    monkeypatch.setattr(os, "sendfile", fill)
    assert run(tmp_path, copy) == 1
    assert f"could not write {tmp_path / 'run/02_compress/copy.bin'}\n" in capsys.readouterr().err
    assert not list((tmp_path / "run/02_compress").glob("copy*"))


@pytest.mark.parametrize("kept", ["", " without --force: finished layers are kept"])
def test_a_full_disk_says_what_is_kept_under_force(tmp_path, capsys, kept, monkeypatch):
    def fill(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    assert run(tmp_path, write_output) == 0
    if kept:
        assert run(tmp_path, fill, "--force") == 1
    else:  # before the old result is set aside
        monkeypatch.setattr("sparselong.run.command.prepare", fill)
        assert run(tmp_path, write_output, "--force") == 1
    fix = f"free some space, then run the same command again{kept}\n"
    assert capsys.readouterr().err.endswith(fix)


def test_an_os_error_with_another_number_is_a_bug(tmp_path):
    def miss(stage: Stage) -> None:
        raise OSError(errno.ENOENT, "No space left on device")

    with pytest.raises(OSError):
        run(tmp_path, miss)


@pytest.mark.parametrize(
    ("place", "found"),
    [
        ("file", "File exists"),
        ("file/run", "Not a directory"),
        ("/proc/self/run", "No such file"),  # not writable, and root ignores permissions
    ],
)
def test_a_run_directory_that_cannot_be_used_is_refused(tmp_path, capsys, place, found):
    (tmp_path / "file").write_text("x")
    arguments = [*TINY, "--run-dir", str(tmp_path / place)]
    assert run_stage("02_compress", "", arguments, bug, lambda c, r, n: {}, str) == 1
    told = capsys.readouterr().err
    assert "cannot be created or written" in told and found in told and len(told.splitlines()) == 4


def test_a_stage_directory_that_cannot_be_written_is_refused(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/02_compress").write_text("in the way")
    assert run(tmp_path, bug) == 1
    assert "02_compress was not written by a stage" in capsys.readouterr().err
    assert (tmp_path / "run/02_compress").read_text() == "in the way"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_is_explained_and_keeps_existing_files(tmp_path, capsys, number):
    def interrupted(stage: Stage) -> None:
        write_output(stage)
        os.kill(os.getpid(), number)

    assert run(tmp_path, interrupted) == 1
    assert "was interrupted" in capsys.readouterr().err
    assert (tmp_path / "run/02_compress/out.bin").exists()
    assert read_manifest(tmp_path / "run", "02_compress") is None


def test_two_runs_in_one_directory(tmp_path, capsys):
    def second(stage: Stage) -> None:
        assert run(tmp_path, write_output) == 1
        told = capsys.readouterr().err
        program = Path("/proc/self/cmdline").read_text().split("\0")[0]
        assert "is in use" in told and f"process {os.getpid()} ({program}" in told
        # As of another host: a process of this one with the number has not opened the file.
        (tmp_path / "run/.lock").write_text(str(os.getppid()))
        assert run(tmp_path, write_output) == 1
        assert f"process {os.getppid()} holds its lock" in capsys.readouterr().err
        write_output(stage)

    assert run(tmp_path, second) == 0


def test_a_stage_needs_the_earlier_one_of_the_same_config(tmp_path, capsys):
    def needy(stage: Stage) -> None:
        assert stage.manifests["02_compress"]["metrics"] == {"figure": 3}

    assert run(tmp_path, bug, name="03_finetune") == 1
    assert "needs 02_compress" in capsys.readouterr().err
    assert not (tmp_path / "run/03_finetune").exists()
    assert run(tmp_path, write_output) == 0
    assert run(tmp_path, needy, name="03_finetune") == 0
    assert run(tmp_path, bug, "experts.sparsity=2:4", "--force", name="03_finetune") == 1
    told = capsys.readouterr().err
    assert "made with another config" in told
    words = f"--config {tmp_path}/run/config.yaml --run-dir {tmp_path}/run"
    assert f"pass what it was made with: {words}, or another --run-dir" in told
    (tmp_path / "run/config.yaml").write_text("seed: 8\n")  # of neither: it is not offered
    assert run(tmp_path, bug, "experts.sparsity=2:4", "--force", name="03_finetune") == 1
    assert "pass what it was made with, or another --run-dir" in capsys.readouterr().err
    assert read_manifest(tmp_path / "run", "03_finetune"), (
        "a refusal must leave the result unchanged"
    )


def test_a_result_made_from_an_outdated_result_is_stale(tmp_path, capsys):
    def tune(stage: Stage) -> None:
        assert list(stage.manifests) == ["02_compress"]

    assert run(tmp_path, write_output) == 0
    assert run(tmp_path, tune, name="03_finetune") == 0
    assert run(tmp_path, write_output, "--force") == 0  # the same bytes
    assert run(tmp_path, tune, name="03_finetune") == 0
    assert run(tmp_path, write_other, "--force") == 0
    assert run(tmp_path, tune, name="03_finetune") == 1
    assert "no longer exists" in capsys.readouterr().err
    assert run(tmp_path, tune, "--force", name="03_finetune") == 0


def test_dry_run_touches_nothing(tmp_path, capsys):
    assert run(tmp_path, fail, "--dry-run") == 0
    assert "02_compress" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_config_errors_exit_with_two(tmp_path, capsys):
    assert run(tmp_path, fail, "sed=1") == 2
    assert "did you mean seed?" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_atomic_writes_leave_the_old_file_when_they_fail(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    write_atomically(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        write_atomically(path, "new")
    assert [one.name for one in tmp_path.iterdir()] == ["file.txt"] and path.read_text() == "old"


@pytest.mark.parametrize("file", ["manifest.json", "started.json"])
def test_work_of_another_version_is_refused_as_such(tmp_path, capsys, file):
    assert run(tmp_path, write_output) == 0
    folder = tmp_path / "run/02_compress"
    document = json.loads((folder / file).read_text()) | {"format_version": 1}
    for name in ("manifest.json", "started.json"):
        (folder / name).unlink()
    (folder / file).write_text(json.dumps(document))
    capsys.readouterr()
    assert run(tmp_path, write_output) == 1
    assert "written by another version" in capsys.readouterr().err
    assert run(tmp_path, write_output, "--force") == 0


def test_a_check_comes_before_a_forced_stage_is_set_aside(tmp_path):
    assert run(tmp_path, write_output) == 0

    def check(config):
        raise StageError("it cannot run", "another", "this", "change it")

    arguments = [*TINY, "--run-dir", str(tmp_path / "run"), "--force"]
    plan = {"plan": lambda c, r, n: {"stage": n}, "show_plan": str}
    assert run_stage("02_compress", "test", arguments, write_output, **plan, check=check) == 1
    assert read_manifest(tmp_path / "run", "02_compress") is not None
