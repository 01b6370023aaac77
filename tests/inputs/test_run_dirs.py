"""Run directories: what cannot be one, and what somebody else has put there."""

import errno
import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sparselong.errors import StageError
from sparselong.run import Stage, lock, run_stage
from sparselong.run.lock import locked
from tests.conftest import ROOT

SCRIPTS = ("01_health", "02_compress", "03_finetune", "04_eval", "05_export")
PLAN = {"plan": lambda c, r, n: {"stage": n}, "show_plan": str}


def work(stage: Stage) -> None:
    (stage.dir / "out.bin").write_bytes(b"abc")
    stage.outputs = [stage.dir / "out.bin"]


def run(run_dir: Path | str, *more: str, name: str = "02_compress") -> int:
    arguments = ["--config", str(ROOT / "configs/tiny.yaml"), "--run-dir", str(run_dir), *more]
    return run_stage(name, "test", arguments, work, **PLAN)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != lock.LOCK
    }


def refused(capsys, *words: str) -> None:
    told = capsys.readouterr().err
    assert told.count("error:    ") == 1 and len(told.splitlines()) == 4, told
    for word in words:
        assert word in told


@pytest.mark.parametrize("script", SCRIPTS)
def test_places_that_cannot_be_made(script, run_script, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for place in ("file", "file/below", "dangling", "loop", "loop/below"):
        run_script(script, run_dir=tmp_path / place).assert_explained(str(tmp_path / place))
    run_script(script, run_dir=Path("/proc/self/run")).assert_explained("/proc/self/run")
    assert (tmp_path / "file").read_text() == "x" and not (tmp_path / "nowhere").exists()


def test_links_and_relative_paths_are_followed(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    assert run("../link/a") == 0 and (tmp_path / "real/a/02_compress/manifest.json").exists()
    monkeypatch.setenv("HOME", str(tmp_path / "real"))
    assert run("~/b") == 0 and (tmp_path / "real/b/config.yaml").exists()


@pytest.mark.parametrize("below", ["", "run", "../base/x/.."])
def test_the_base_model_is_no_run_directory(base, below, run_script):
    before = contents(base)
    for script in SCRIPTS:
        outcome = run_script(script, f"model.base={base}", run_dir=base / below)
        outcome.assert_explained("cannot be the run directory", "model.base")
    assert contents(base) == before and not (base / "run").exists()


def test_a_link_to_the_base_model_is_no_run_directory(base, tmp_path, run_script):
    (tmp_path / "link").symlink_to(base)
    run_script("02_compress", f"model.base={tmp_path / 'link'}", run_dir=base).assert_explained(
        "model.base"
    )


def test_a_directory_of_a_stage_is_no_run_directory(tmp_path, capsys):
    assert run(tmp_path / "run") == 0
    capsys.readouterr()
    before = contents(tmp_path)
    for below in ("02_compress", "02_compress/model", "02_compress/x/y"):
        assert run(tmp_path / "run" / below) == 2
        refused(capsys, "cannot be the run directory", "02_compress")
    assert contents(tmp_path) == before


def test_a_directory_of_an_export_is_no_run_directory(tmp_path, capsys):
    folder = tmp_path / "run/05_export/mxfp4"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    for below in ("05_export", "05_export/mxfp4", "05_export/mxfp4/x"):
        assert run(tmp_path / "run" / below) == 2
        refused(capsys, "cannot be the run directory", "05_export")


@pytest.mark.parametrize("key", ["data.train", "data.validation"])
def test_data_in_a_folder_that_the_run_replaces_is_refused(key, tmp_path, capsys):
    for place in ("data", "02_compress", "03_finetune.replaced"):
        (tmp_path / "run" / place).mkdir(parents=True)
        path = tmp_path / "run" / place / "train.jsonl"
        path.write_text("mine")
        assert run(tmp_path / "run", f"{key}={path}") == 2
        refused(capsys, key, str(path))
        assert path.read_text() == "mine"


def test_data_beside_the_run_is_fine(tmp_path):
    (tmp_path / "rows.jsonl").write_text("mine")
    assert run(tmp_path, f"data.train={tmp_path / 'rows.jsonl'}") == 0
    assert (tmp_path / "rows.jsonl").read_text() == "mine"


FOREIGN = [
    *("config.yaml", "data/rows.jsonl", "base/config.json", "02_compress/mine.txt"),
    *("02_compress", "02_compress.replaced/mine.txt", "04_eval/mine.txt", ".lock"),
]


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize("name", FOREIGN)
def test_what_others_have_put_there_is_neither_replaced_nor_deleted(name, force, tmp_path, capsys):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("# mine\nseed: 1\n")
    assert run(tmp_path / "run", *force) == 1
    refused(capsys, str(tmp_path / "run" / name.partition("/")[0]))
    assert path.read_text() == "# mine\nseed: 1\n"
    assert {p for p in (tmp_path / "run").iterdir() if p.name != ".lock"} <= {
        tmp_path / "run" / name.partition("/")[0]
    }


def test_other_files_in_the_run_directory_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert run(tmp_path) == 0 and run(tmp_path, "--force") == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_directory_of_other_things_is_no_run_directory(tmp_path, capsys):
    home = tmp_path / "home"
    for name in ("Documents", "Pictures", ".cache", "data"):
        (home / name).mkdir(parents=True)
    (home / "taxes.ods").write_text("mine")
    before = sorted(home.rglob("*"))
    for more in ((), ("--dry-run",), ("--force",)):
        assert run(home, *more) == 2
        refused(capsys, f"{home} cannot be the run directory", "Documents, Pictures, taxes.ods")
    assert run("/", "--dry-run") == 2
    refused(capsys, "/ cannot be the run directory", "more")
    assert sorted(home.rglob("*")) == before


def test_what_is_found_beside_a_run_is_no_obstacle(tmp_path):
    """A mounted disk, notes, the shell's logs, the rows, the config and the base of the run."""
    place = tmp_path / "run"
    for name in ("lost+found", "cache", "models/base", ".ipynb_checkpoints"):
        (place / name).mkdir(parents=True)
    for name in (".gitkeep", "date.txt", "nohup.out", "README.md", "Run 1.LOG"):
        (place / name).write_text("")
    config = place / "my.yaml"
    config.write_text((ROOT / "configs/tiny.yaml").read_text())
    (place / "rows.jsonl").write_text("mine")
    named = (f"data.train={place}/rows.jsonl", f"model.base={place}/models/base")
    arguments = ["--config", str(config), "--run-dir", str(place), *named]
    assert run_stage("02_compress", "test", arguments, work, **PLAN) == 0
    (place / "pictures").mkdir()  # it is a run directory now
    assert run_stage("02_compress", "test", arguments, work, **PLAN) == 0


DAMAGES = ["", "{", "[]", "null", "{}", '{"config_hash": 3}', "\x00\xff", "[" * 100_000, '"x"']


@pytest.mark.parametrize("text", DAMAGES)
@pytest.mark.parametrize("file", ["manifest.json", "started.json"])
def test_a_damaged_manifest_is_explained(file, text, tmp_path, capsys):
    assert run(tmp_path) == 0
    folder = tmp_path / "02_compress"
    if file == "started.json":
        (folder / "manifest.json").unlink()
    (folder / file).write_bytes(text.encode("latin-1"))
    before = contents(folder)
    capsys.readouterr()
    assert run(tmp_path) == 1
    refused(capsys, "02_compress")
    before["log.txt"] = contents(folder)["log.txt"]  # has the refusal too
    assert contents(folder) == before
    if file == "manifest.json":
        assert run(tmp_path, name="03_finetune") == 1
    assert run(tmp_path, "--force") == 0 and run(tmp_path) == 0


@pytest.mark.parametrize(
    "change",
    [
        *({"metrics": None}, {"outputs": {}}, {"outputs": [1]}, {"seconds": "1"}, {"status": 1}),
        *({"stage": "01_health"}, {"inputs": [{"path": "x"}]}, {"format_version": "2"}),
        {"made_from": 3},
    ],
)
def test_a_manifest_of_another_shape_is_explained(change, tmp_path, capsys):
    assert run(tmp_path) == 0
    path = tmp_path / "02_compress/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    capsys.readouterr()
    assert run(tmp_path) == 1
    refused(capsys, "02_compress")


@pytest.mark.parametrize("name", ["manifest.json", "started.json", "log.txt"])
def test_a_directory_in_the_place_of_a_file_is_explained(name, tmp_path, capsys):
    folder = tmp_path / "02_compress"
    (folder / name).mkdir(parents=True)
    if name == "log.txt":
        (folder / "started.json").write_text("{}")
    assert run(tmp_path) == 1
    refused(capsys, "02_compress")
    assert (folder / name).is_dir()


@pytest.mark.parametrize("text", ["", "seed: 1  # mine\n", "a: [", "- 1\n", "\x00", "# only\n"])
def test_a_config_that_somebody_wrote_is_not_replaced(text, tmp_path, capsys):
    assert run(tmp_path) == 0
    (tmp_path / "config.yaml").write_text(text)
    capsys.readouterr()
    assert run(tmp_path, "--force") == 1
    refused(capsys, "config.yaml")
    assert (tmp_path / "config.yaml").read_text() == text


def test_the_written_config_can_be_passed_again(tmp_path):
    assert run(tmp_path) == 0
    arguments = ["--config", str(tmp_path / "config.yaml"), "--run-dir", str(tmp_path), "--force"]
    assert run_stage("02_compress", "test", arguments, work, **PLAN) == 0


@pytest.mark.parametrize("name", ["data", "base", "cache"])
def test_a_file_in_the_place_of_a_folder_is_explained(name, tmp_path, capsys):
    assert run(tmp_path) == 0
    (tmp_path / name).write_text("mine")
    capsys.readouterr()
    assert run(tmp_path, "--force") == 1
    refused(capsys, str(tmp_path / name))
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EIO, errno.EISDIR])
def test_a_file_that_the_system_refuses_is_explained(number, tmp_path, capsys):
    def fail(stage: Stage) -> None:
        raise OSError(number, os.strerror(number), "/some/file")

    arguments = ["--config", str(ROOT / "configs/tiny.yaml"), "--run-dir", str(tmp_path)]
    assert run_stage("02_compress", "test", arguments, fail, **PLAN) == 1
    refused(capsys, "/some/file", os.strerror(number))
    assert "Traceback" in (tmp_path / "02_compress/log.txt").read_text()


LACKING = [errno.ENOSYS, errno.ENOLCK, errno.EACCES, errno.EOPNOTSUPP, errno.EINVAL]


@pytest.fixture
def no_flock(monkeypatch, request):
    def refuse(*arguments):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr("fcntl.flock", refuse)


@pytest.mark.parametrize("no_flock", LACKING, indirect=True)
def test_without_flock_a_lock_file_does(no_flock, tmp_path, capsys):
    assert run(tmp_path / "run") == 0
    told = capsys.readouterr().err
    assert sum("cannot be locked by the system" in line for line in told.splitlines()) == 1
    with locked(tmp_path / "run"), pytest.raises(StageError, match=f"process {os.getpid()}"):
        with locked(tmp_path / "run"):
            pass
    assert not (tmp_path / "run" / lock.OWNER).exists()


def ended_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


@pytest.mark.parametrize("no_flock", LACKING[:1], indirect=True)
@pytest.mark.parametrize("kind", ["ended", "number used again"])
def test_the_lock_file_of_a_killed_process_is_taken_over(no_flock, kind, tmp_path):
    process = ended_process() if kind == "ended" else os.getpid()
    owner = {"host": socket.gethostname(), "pid": process, "started": "1"}
    (tmp_path / lock.OWNER).write_text(json.dumps(owner))
    with locked(tmp_path):
        assert json.loads((tmp_path / lock.OWNER).read_text())["pid"] == os.getpid()
    assert {path.name for path in tmp_path.iterdir()} == {lock.LOCK}


@pytest.mark.parametrize("no_flock", LACKING[:1], indirect=True)
@pytest.mark.parametrize(
    ("content", "word"),
    [
        ('{"host": "elsewhere", "pid": 1}', "host elsewhere"),
        (json.dumps({"host": socket.gethostname(), "pid": 1}), "process 1 "),
        (json.dumps({"host": socket.gethostname(), "pid": 2**70}), "process "),
        *(("", "cannot be read"), ("[]", "cannot be read"), ('{"host": 1}', "cannot be read")),
        ("[" * 99_999, "nested too deeply"),
    ],
)
def test_any_other_lock_file_is_explained(no_flock, content, word, tmp_path):
    (tmp_path / lock.OWNER).write_text(content)
    with pytest.raises(StageError, match=f"(?s)in use.*{word}"), locked(tmp_path):
        pass
    assert (tmp_path / lock.OWNER).read_text() == content
