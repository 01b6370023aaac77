"""The trainer's environment and its failures."""

import sys

import pytest

from sparselong.config import load
from sparselong.errors import StageError
from sparselong.processes import process
from sparselong.registration import ALLOCATOR
from sparselong.run import Stage
from tests.conftest import ROOT

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None, None), ALLOCATOR),
        (("max_split_size_mb:64", None), "max_split_size_mb:64"),
        ((None, "backend:cudaMallocAsync"), "backend:cudaMallocAsync"),
        (("max_split_size_mb:64", "backend:native"), "max_split_size_mb:64"),
    ],
)
def test_segments_expand_unless_the_user_configures_the_allocator(monkeypatch, given, expected):
    for name, value in zip(NAMES, given, strict=True):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert process._environment()["PYTORCH_ALLOC_CONF"] == expected


@pytest.mark.parametrize("forced", [False, True])
def test_a_trainers_full_disk_says_what_is_kept(tmp_path, forced):
    """With --force, the same command would start over."""
    stage = Stage("03_finetune", load(ROOT / "configs/tiny.yaml"), tmp_path, forced=forced)
    stage.dir.mkdir()
    text = (
        "from pathlib import Path; from sparselong.processes import tell_failures; "
        f"tell_failures(Path({str(stage.dir)!r})); raise OSError(28, 'No space left on device')"
    )
    with pytest.raises(StageError, match="could not write to") as failure:
        process.run_trainer(stage, [sys.executable, "-c", text])
    force = " without --force" if forced else ""
    assert failure.value.fix == (
        f"free some space, then run the same command{force} again: training continues from its "
        "last whole checkpoint, if there is one"
    )
