"""Safetensors files that several processes write together, each its rows of large tensors.

One process writes the header and the small tensors (`begin_file`). Then each process writes its
rows of the others in place (`write_rows`), so none ever holds a whole one. The finished file has
the bytes that the safetensors library would write for the same tensors.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sparselong.checkpoint.header import read_header

_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""safetensors' names of dtypes, in its order. A file begins with tensors of the last one."""
_CHUNK_BYTES = 1 << 26


class Entry(NamedTuple):
    """A tensor's place in a header: safetensors dtype, shape and size."""

    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


def make_header(entries: Iterable[tuple[str, Entry]]) -> bytes:
    """Return the beginning of a safetensors file whose tensors follow in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, entry in entries:
        header[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.size_bytes],
        }
        offset += entry.size_bytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def begin_file(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file with everything but the data of tensors on the meta device.

    Args:
        path: the file; not atomic, because others will complete it.
        tensors: tensors by name; those on the meta device stand for rows written later.
    """
    entries = _sort_entries(tensors)
    header = make_header(entries)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(entry.size_bytes for _, entry in entries))
        file.flush()
        os.fsync(file.fileno())
    for name, _ in entries:
        if not tensors[name].is_meta:
            write_rows(path, name, tensors[name])


def _sort_entries(tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, Entry]]:
    """Return the tensors' places in a header, in the order in which safetensors writes them."""
    order = list(_NAMES)
    names = sorted(tensors, key=lambda name: (-order.index(tensors[name].dtype), name))
    return [
        (n, Entry(_NAMES[tensors[n].dtype], tuple(tensors[n].shape), tensors[n].nbytes))
        for n in names
    ]


@torch.no_grad()
def file_pieces(tensors: Mapping[str, torch.Tensor]) -> Iterator[Any]:
    """Yield a safetensors file in pieces of at most 64 MiB beside its header."""
    entries = _sort_entries(tensors)
    yield make_header(entries)
    for name, _ in entries:
        yield from _pieces(tensors[name])


def _pieces(tensor: torch.Tensor) -> Iterator[Any]:
    for part in tensor.contiguous().reshape(-1).view(torch.uint8).split(_CHUNK_BYTES):
        yield part.cpu().numpy()


@torch.no_grad()
def write_rows(path: Path, name: str, rows: torch.Tensor, first: int = 0) -> None:
    """Write rows of a tensor of `begin_file`'s file, at most 64 MiB at a time.

    Args:
        path: the file.
        name: the tensor.
        rows: consecutive rows along its first dimension.
        first: index of the first of them.

    Raises:
        ValueError: the tensor has no such rows, or another dtype or shape.
    """
    record = read_header(path)[name]
    fits = 0 <= first and first + len(rows) <= record.shape[0] if record.shape else not first
    if (_NAMES[rows.dtype], rows.shape[1:]) != (record.dtype, record.shape[1:]) or not fits:
        raise ValueError(
            f"{name}: rows {rows.dtype} {list(rows.shape)} from {first} on; allowed: rows of "
            f"{record.dtype} {list(record.shape)}"
        )
    row_bytes = (record.end - record.begin) // max(1, record.shape[0] if record.shape else 1)
    with path.open("r+b") as file:
        file.seek(record.begin + first * row_bytes)
        for piece in _pieces(rows):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
