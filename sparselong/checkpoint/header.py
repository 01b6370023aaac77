"""Headers of safetensors files, read strictly. No torch.

Readers differ in what they make of a damaged file: some ignore bytes that no tensor claims. Here, a
file either has one meaning or is refused, with the reason.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparselong.errors import StageError
from sparselong.files import LFS_POINTER, parse_json, reason_of, refuse_special

BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Bits of an element by safetensors dtype."""
_LARGEST_HEADER_BYTES = 100_000_000
_LFS = LFS_POINTER.encode()


@dataclass(frozen=True)
class TensorRecord:
    """Location of a tensor: file, safetensors dtype, shape, and byte range in the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def damaged(
    path: Path, found: str, expected: str = "a complete safetensors file", fix: str | None = None
) -> StageError:
    """Return the failure of a file that cannot be read."""
    fix = fix or "download or copy this file again"
    return StageError(f"{path} cannot be read", expected, found, fix)


def read_header(path: Path) -> dict[str, TensorRecord]:
    """Return the tensor records of one safetensors file without reading the tensors.

    Raises:
        StageError: the file is missing, unreadable, truncated or not safetensors, or its tensors
            do not fill it exactly.
    """
    try:
        refuse_special(path)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            is_pointer = (prefix + file.read(len(_LFS))).startswith(_LFS)
            file.seek(8)
            raw = file.read(length) if 0 < length <= _LARGEST_HEADER_BYTES else b""
    except OSError as error:
        raise damaged(path, reason_of(error)) from error
    if is_pointer:
        found = "a Git LFS pointer, a small text file in place of the file itself"
        raise damaged(path, found, fix="fetch the file itself: git lfs pull, or hf download")
    if 0 < len(raw) < length:
        raise damaged(path, f"{size} bytes, but its header requires {8 + length}: truncated")
    try:
        header = parse_json(raw.decode("utf-8"))
        metadata = header.pop("__metadata__", None)
        if not isinstance(metadata, dict | None) or not all(
            isinstance(value, str) for value in (metadata or {}).values()
        ):
            raise ValueError("__metadata__ is not an object of strings")
        records = {name: _record(path.name, name, header[name], 8 + length) for name in header}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f": {error}" if raw and isinstance(error, ValueError) else ""
        found = f"a header that is not in safetensors format{reason}"
        raise damaged(path, found) from error
    _check_layout(path, records, 8 + length, size)
    return records


def _record(file: str, name: str, entry: Any, start: int) -> TensorRecord:
    """Return the record of a header's entry; raise ValueError if its size is not its shape's."""
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [*shape, *offsets]
    if any(type(number) is not int or number < 0 for number in numbers) or len(offsets) != 2:
        raise ValueError(f"{name} has shape {shape} and data_offsets {offsets}")
    if dtype not in BITS:
        raise ValueError(f"{name} has the unknown dtype {dtype!r}")
    begin, end = offsets
    if 8 * (end - begin) != math.prod(shape) * BITS[dtype]:
        raise ValueError(f"{name} has {end - begin} bytes, but is {dtype} {shape}")
    return TensorRecord(file, dtype, tuple(shape), start + begin, start + end)


def _check_layout(path: Path, records: dict[str, TensorRecord], start: int, size: int) -> None:
    """Raise unless the tensors follow one another from `start` to the file's end."""
    end, last = start, "the header"
    for name, record in sorted(records.items(), key=lambda item: (item[1].begin, item[1].end)):
        if record.begin != end:
            kind = "overlap" if record.begin < end else "leave a gap"
            found = f"a header in which {last} and {name} {kind}"
            raise damaged(path, found, "a safetensors file whose tensors follow one another")
        end, last = record.end, name
    if size < end:
        raise damaged(path, f"{size} bytes, but its header requires {end}: truncated")
    if size > end:
        raise damaged(path, f"{size} bytes, but its tensors end at {end}: trailing bytes")
