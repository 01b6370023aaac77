"""write_tensors makes the bytes of the safetensors library, and holds no copy of the file."""

import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from sparselong.checkpoint import write_tensors


def test_the_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "b.bf16": torch.randn(3, 5, generator=generator).bfloat16(),
        "a.bf16": torch.randn(4, 6, generator=generator).bfloat16().T,
        "codes": torch.randint(-8, 8, (7,), generator=generator, dtype=torch.int8),
        "mask": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "wide": torch.randn(2, 2, generator=generator, dtype=torch.float64),
    }
    path = tmp_path / "made.safetensors"
    write_tensors(path, tensors)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert path.read_bytes() == save(whole, {"format": "pt"})
    read = load_file(path)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_the_file_is_not_made_in_memory(tmp_path: Path) -> None:
    tensor = torch.zeros(40, 2**20, dtype=torch.uint8)
    tracemalloc.start()
    try:
        write_tensors(tmp_path / "large.safetensors", {"zeros": tensor})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < tensor.nbytes / 4


def test_a_failure_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch) -> None:
    import os

    path = tmp_path / "made.safetensors"
    write_tensors(path, {"a": torch.ones(3)})
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_tensors(path, {"a": torch.zeros(3)})
    assert path.read_bytes() == before
