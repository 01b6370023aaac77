"""Files that several processes write in place have the bytes that safetensors itself writes."""

import pytest
import torch
from safetensors.torch import save

from sparselong.checkpoint import begin_file, write_rows

TENSORS = {
    "b.blocks": torch.arange(6 * 8, dtype=torch.uint8).view(6, 4, 2),
    "a.scales": torch.arange(6 * 4, dtype=torch.uint8).view(6, 4),
    "router": torch.randn(5, 3).bfloat16(),
    "half": torch.randn(3).half(),
    "scale": torch.randn(7, 1),
    "wide": torch.randn(2).double(),
    "numbers": torch.arange(3),
    "mask": torch.tensor([True, False]),
    "small": torch.arange(5, dtype=torch.int8),
    "short": torch.arange(2, dtype=torch.int16),
    "int": torch.arange(2, dtype=torch.int32),
    "scalar": torch.tensor(2.5),
}
SHARED = ("b.blocks", "a.scales")


def test_rows_of_several_processes_make_the_librarys_file(tmp_path, monkeypatch):
    monkeypatch.setattr("sparselong.checkpoint.slices._CHUNK_BYTES", 5)
    path = tmp_path / "tuned.safetensors"
    begin_file(path, {n: t.to("meta") if n in SHARED else t for n, t in TENSORS.items()})
    for first in (4, 0, 2):  # in any order
        for name in SHARED:
            write_rows(path, name, TENSORS[name][first : first + 2], first)
    assert path.read_bytes() == save(TENSORS, {"format": "pt"})


@pytest.mark.parametrize(
    ("rows", "first"),
    [
        (TENSORS["a.scales"][:3], 4),
        (TENSORS["a.scales"][:3], -1),
        (TENSORS["a.scales"][:3, :2], 0),
        (TENSORS["a.scales"][:3].float(), 0),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, rows, first):
    path = tmp_path / "tuned.safetensors"
    begin_file(path, {"a.scales": TENSORS["a.scales"].to("meta")})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="a.scales"):
        write_rows(path, "a.scales", rows, first)
    assert path.read_bytes() == before
