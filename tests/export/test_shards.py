"""A safetensors file is compared with its source before it has its name."""

import pytest
import torch

from sparselong.checkpoint import read_header
from sparselong.errors import StageError
from sparselong.export import shards

SHAPES = {"a": ("U8", (3, 5)), "b": ("BF16", (2, 4)), "c": ("U8", (4, 2))}
VALUES = {
    "a": torch.arange(15, dtype=torch.uint8).view(3, 5),
    "b": torch.arange(8).view(2, 4).bfloat16(),
    "c": torch.arange(8, dtype=torch.uint8).view(4, 2),
}


def test_wider_types_come_first(tmp_path):
    """So that each tensor begins at a multiple of its type's bytes, as its readers may expect."""
    shards._write_shard(tmp_path / "x", SHAPES, lambda name: iter(VALUES[name].split(2)))
    records = read_header(tmp_path / "x")
    assert all(one.begin % shards._BYTES[one.dtype] == 0 for one in records.values())
    content = (tmp_path / "x").read_bytes()
    for name, one in records.items():
        assert content[one.begin : one.end] == VALUES[name].view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("change", [lambda v: v[:-1], lambda v: torch.cat((v, v[:1]))])
def test_rows_that_are_missing_or_too_many_are_found(tmp_path, name, change):
    """As if a source gave other rows than its shape says, twice."""

    def parts(each):
        yield change(VALUES[each]) if each == name else VALUES[each]

    with pytest.raises(StageError):
        shards._write_shard(tmp_path / "x", SHAPES, parts)
    assert not list(tmp_path.iterdir())
