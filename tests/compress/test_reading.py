"""Reading ahead and hashing the base beside the computation, and the threads that do it."""

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

from sparselong import provenance
from sparselong.checkpoint import Checkpoint, layer_tensors, open_upstream
from sparselong.compress.background import Background, Seconds
from sparselong.compress.reading import BaseFiles, LayerReader
from sparselong.errors import StageError


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "run/02_compress"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def own_base(untrained_base, tmp_path) -> Checkpoint:
    """A copy of the base that the test may change; layer n is in shard n + 1 of 4."""
    return Checkpoint(Path(shutil.copytree(untrained_base, tmp_path / "base")))


def open_files(base: Checkpoint, folder: Path) -> BaseFiles:
    files = BaseFiles(base, folder, folder.parent)
    files.begin()
    return files


def recorded(folder: Path) -> set[str]:
    rows = json.loads((folder / "base.json").read_text())["files"]
    return {Path(row["path"]).name for row in rows}


def test_layers_are_read_as_they_are_stored(untrained_base):
    base = Checkpoint(untrained_base)
    architecture = open_upstream(base)
    with LayerReader(base, architecture, torch.device("cpu")) as reader:
        reader.begin(0)
        for index in range(4):
            tensors, seconds = reader.take()
            if index < 3:
                reader.begin(index + 1)
            wanted = base.read(layer_tensors(architecture, index))
            assert tensors.keys() == wanted.keys() and seconds > 0
            assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)


def test_files_are_recorded_as_layers_need_them(own_base, folder):
    first = set(own_base.side_files) | {"config.json", "model.safetensors.index.json"}
    with open_files(own_base, folder) as files:
        files.settle(0)
        early = recorded(folder)
        assert first <= early < set(own_base.inventory.names)
    with open_files(own_base, folder) as files:  # as after an interruption
        assert {Path(row["path"]).name for row in files.rows} == early
        files.settle(2)
        files.settle()
    assert recorded(folder) == {Path(name).name for name in own_base.inventory.names}
    rows = json.loads((folder / "base.json").read_text())["files"]
    hashes = {row["path"]: row["sha256"] for row in rows}
    for path in own_base.inventory.paths:
        assert hashes[str(path)] == provenance.hash_file(path)


def test_a_file_that_changes_between_reading_and_hashing_is_refused(own_base, folder):
    """Otherwise the record would be of bytes that were never read."""
    files = BaseFiles(own_base, folder, folder.parent)
    path = own_base.directory / own_base.files[-1]
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(1, 1))
    files.begin()
    with files, pytest.raises(StageError, match="has changed since 02_compress opened it") as found:
        files.settle()
    assert path.name in found.value.what and "--force" in found.value.fix
    assert path.name not in (recorded(folder) if (folder / "base.json").exists() else set())


def test_a_recorded_file_that_changes_is_refused_when_the_work_is_resumed(own_base, folder):
    with open_files(own_base, folder) as files:
        files.settle(0)
    path = own_base.directory / "config.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(StageError, match="config.json has changed since 02_compress recorded it"):
        BaseFiles(own_base, folder, folder.parent)


def test_a_jobs_error_is_raised_when_the_next_begins():
    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Background() as thread:
        thread.start(fail)
        thread.start(pytest.fail, "began although the job before it had failed")
    with pytest.raises(KeyboardInterrupt), Background() as thread:
        thread.start(fail)
    with pytest.raises(ValueError, match="the block's"), Background() as thread:
        thread.start(fail)
        raise ValueError("the block's")


def test_a_block_ends_after_its_job():
    begun, ended = threading.Event(), []

    def work() -> int:
        begun.wait(5)
        ended.append(1)
        return 7

    with Background() as thread:
        thread.start(work)
        assert not ended
        begun.set()
        assert thread.join() == 7 and thread.join() is None
        thread.start(work)
    assert ended == [1, 1]


def test_seconds_are_summed_by_part():
    seconds = Seconds()
    for _ in range(2):
        with seconds.measuring("a"):
            pass
    with pytest.raises(ValueError), seconds.measuring("b"):
        raise ValueError
    assert set(seconds.by_part) == {"a"} and 0 < seconds.by_part["a"] < 1
