"""The trainer's environment."""

from types import SimpleNamespace

import pytest

from sparselong.memory import ALLOCATOR
from sparselong.processes import process

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
def test_segments_expand_unless_the_user_configures_the_allocator(
    monkeypatch, tmp_path, given, expected
):
    for name, value in zip(NAMES, given, strict=True):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    stage: object = SimpleNamespace(dir=tmp_path)
    assert process._environment(stage)["PYTORCH_ALLOC_CONF"] == expected  # type: ignore[arg-type]
