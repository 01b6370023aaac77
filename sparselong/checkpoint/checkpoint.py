"""Reading a sharded safetensors checkpoint piece by piece, and deriving a new one from it.

Opening a `Checkpoint` checks that every indexed tensor is in a shard that exists and is complete;
`check` compares names, dtypes and shapes with the architecture. A damaged download is thus found in
the first second, not after an hour of work. Tensors are then read one layer at a time.

A derived checkpoint reuses the shards that it does not change. A shard is hard-linked if the file
system allows it, even if other files replace up to 5 % of its bytes: the published 120b interleaves
attention (2.9 % of a shard) with experts, and linking saves 61 GB there. transformers loads every
tensor of a shard, so a shard is not linked if another file holds a new tensor under the name of a
replaced one. Other replaced tensors have names that the model lacks, and the quantizer ignores
them. A shard that is not linked is copied in a stream, without its replaced tensors.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sparselong.errors import StageError
from sparselong.files import write_atomically
from sparselong.packing import mxfp4

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_LINKED_STALE_SHARE = 0.05
_COPY_BYTES = 1 << 24
_SLICE_ROWS = 8192


@dataclass(frozen=True)
class TensorRecord:
    """Location of a tensor: file, safetensors dtype, shape, and byte range in the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _damaged(path: Path, found: str) -> StageError:
    return StageError(
        f"{path} cannot be read",
        "a complete safetensors file",
        found,
        "download or copy this file again",
    )


def read_header(path: Path) -> dict[str, TensorRecord]:
    """Return the tensor records of one safetensors file without reading the tensors.

    Raises:
        StageError: the file is missing, unreadable, truncated or not safetensors.
    """
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            raw = file.read(length) if 0 < length <= 100_000_000 else b""
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        start = 8 + length
        records = {
            name: TensorRecord(
                path.name,
                entry["dtype"],
                tuple(entry["shape"]),
                start + entry["data_offsets"][0],
                start + entry["data_offsets"][1],
            )
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, "a header that is not in safetensors format") from error
    end = max((record.end for record in records.values()), default=8 + length)
    if size < end:
        raise _damaged(path, f"{size} bytes, but its header requires {end}: truncated")
    return records


class Checkpoint:
    """An opened checkpoint directory.

    Args:
        directory: contains config.json, the shards and their index (or one model.safetensors).

    Raises:
        StageError: a file is missing or damaged, or the index does not match the shards.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.config = self._read_json("config.json")
        if (directory / INDEX).exists():
            weight_map = self._read_weight_map()
        else:
            weight_map = dict.fromkeys(read_header(directory / _SINGLE), _SINGLE)
        self.tensors = self._locate(weight_map)

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.directory / name
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            found = type(document).__name__
        except (OSError, ValueError) as error:
            document, found = None, str(error)
        if not isinstance(document, dict):
            fix = "download the checkpoint again"
            raise StageError(f"{path} cannot be read", "a JSON object in a file", found, fix)
        return document

    def _read_weight_map(self) -> dict[str, str]:
        """Return the index's map from tensor names to files."""
        weight_map = self._read_json(INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) for file in weight_map.values()
        ):
            raise StageError(
                f"{self.directory / INDEX} is not an index",
                "weight_map: an object of tensor names and file names",
                f"weight_map: {type(weight_map).__name__}",
                "download the index again",
            )
        return weight_map

    def _locate(self, weight_map: dict[str, str]) -> dict[str, TensorRecord]:
        headers: dict[str, dict[str, TensorRecord]] = {}
        for file in sorted(set(weight_map.values())):
            if not (self.directory / file).exists():
                raise StageError(
                    f"shard {self.directory / file} is missing",
                    f"every file named in {INDEX}",
                    f"{sum(f == file for f in weight_map.values())} tensors are indexed in it",
                    "download this file again",
                )
            headers[file] = read_header(self.directory / file)
        strays = {p.name for p in self.directory.glob("model-*.safetensors")} - set(headers)
        if strays:
            raise StageError(
                f"{self.directory / INDEX} does not name {', '.join(sorted(strays))}",
                "every shard in the index",
                f"{len(strays)} shards with no indexed tensor",
                "download the index again, or remove files that do not belong here",
            )
        for name, file in weight_map.items():
            if name not in headers[file]:
                raise StageError(
                    f"tensor {name} is missing",
                    f"in {file}, according to the index",
                    "not in that file",
                    "download the shard and the index again",
                )
        return {name: headers[file][name] for name, file in weight_map.items()}

    @property
    def files(self) -> list[str]:
        """Sorted file names of the shards."""
        return sorted({record.file for record in self.tensors.values()})

    def check(self, expected: dict[str, tuple[str, tuple[int, ...]]]) -> None:
        """Raise unless the tensors match `expected`, a map from name to (dtype, shape).

        Raises:
            StageError: a tensor is missing or unexpected, or has another dtype or shape.
        """
        for name, (dtype, shape) in expected.items():
            record = self.tensors.get(name)
            found = f"{record.dtype} {list(record.shape)}" if record else "no such tensor"
            if found != f"{dtype} {list(shape)}":
                raise StageError(
                    f"tensor {name} of {self.directory} does not match config.json",
                    f"{dtype} {list(shape)}",
                    found,
                    "check that config.json and the weights belong together",
                )
        extra = sorted(set(self.tensors) - set(expected))
        if extra:
            raise StageError(
                f"{self.directory} contains tensors that gpt-oss does not have",
                f"{len(expected)} tensors",
                ", ".join(extra[:4]),
                "check that config.json and the weights belong together",
            )

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the named tensors as stored, on the CPU.

        Raises:
            StageError: a file is damaged, or a tensor contains NaN or infinity.
        """
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        tensors = {}
        for file, wanted in by_file.items():
            try:
                with safe_open(self.directory / file, framework="pt") as shard:
                    for name in wanted:
                        tensors[name] = shard.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise _damaged(self.directory / file, str(error)) from error
        for name, tensor in tensors.items():
            self._check_finite(name, tensor)
        return tensors

    def _check_finite(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.is_floating_point():
            bad = int((~torch.isfinite(tensor)).sum())
        else:  # an E8M0 scale of 255 means NaN
            bad = int((tensor == mxfp4.NAN_SCALE).sum()) if name.endswith("_scales") else 0
        if bad:
            raise StageError(
                f"tensor {name} of {self.directory} is damaged",
                "finite values",
                f"{bad} NaN or infinite values",
                "download its shard again",
            )

    def read_slices(self, name: str) -> Iterator[torch.Tensor]:
        """Yield a large tensor in slices of its first dimension, checked as in `read`."""
        record = self.tensors[name]
        with safe_open(self.directory / record.file, framework="pt") as shard:
            rows = shard.get_slice(name)
            for start in range(0, record.shape[0], _SLICE_ROWS):
                part = rows[start : start + _SLICE_ROWS]
                self._check_finite(name, part)
                yield part

    def read_rows(self, name: str, wanted: torch.Tensor) -> torch.Tensor:
        """Return rows [n, …] of a large tensor; `wanted` is sorted and has no duplicates."""
        parts, start = [], 0
        for part in self.read_slices(name):
            here = wanted[(wanted >= start) & (wanted < start + len(part))]
            parts.append(part[here - start])
            start += len(part)
        return torch.cat(parts)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file atomically."""
    partial = path.with_name(path.name + ".partial")
    data = save({name: t.cpu().contiguous() for name, t in tensors.items()}, {"format": "pt"})
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def take_over(source: Path, target: Path, kept: set[str], renewed: set[str]) -> None:
    """Link or copy shard `source` to `target` with at least its kept tensors.

    Args:
        source: a safetensors file.
        target: path of the link or copy; replaced if it exists.
        kept: names of the tensors that remain valid.
        renewed: names of tensors that another file of the target directory now holds.
    """
    records = read_header(source)
    stale_bytes = sum(r.end - r.begin for name, r in records.items() if name not in kept)
    has_namesake = any(name in renewed and name not in kept for name in records)
    partial = target.with_name(target.name + ".partial")
    partial.unlink(missing_ok=True)
    if not has_namesake and stale_bytes <= _LINKED_STALE_SHARE * source.stat().st_size:
        try:
            os.link(source.resolve(), partial)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
                raise
        else:
            partial.replace(target)
            return
    _copy_tensors(source, partial, {name: r for name, r in records.items() if name in kept})
    partial.replace(target)


def _copy_tensors(source: Path, target: Path, records: dict[str, TensorRecord]) -> None:
    """Stream tensors into a new safetensors file, byte for byte, in their original order."""
    ordered = sorted(records.items(), key=lambda item: item[1].begin)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, record in ordered:
        size = record.end - record.begin
        header[name] = {
            "dtype": record.dtype,
            "shape": list(record.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with source.open("rb") as reader, target.open("wb") as writer:
        writer.write(struct.pack("<Q", len(raw)) + raw)
        for _, record in ordered:
            reader.seek(record.begin)
            left = record.end - record.begin
            while left:
                chunk = reader.read(min(left, _COPY_BYTES))
                writer.write(chunk)
                left -= len(chunk)
        writer.flush()
        os.fsync(writer.fileno())


def same_bytes(left: Checkpoint, right: Checkpoint, name: str) -> bool:
    """Return whether a tensor's stored bytes are identical in two checkpoints."""
    a, b = left.tensors[name], right.tensors[name]
    path_a, path_b = left.directory / a.file, right.directory / b.file
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if a.begin == b.begin and os.path.samefile(path_a, path_b):
        return True
    with path_a.open("rb") as file_a, path_b.open("rb") as file_b:
        file_a.seek(a.begin)
        file_b.seek(b.begin)
        left_bytes = a.end - a.begin
        while left_bytes:
            size = min(left_bytes, _COPY_BYTES)
            if file_a.read(size) != file_b.read(size):
                return False
            left_bytes -= size
    return True


def derive(
    source: Checkpoint,
    target: Path,
    dropped: set[str],
    added: Iterable[Path],
    quantization: dict[str, Any],
) -> Checkpoint:
    """Complete `target` as a copy of `source` with some tensors replaced by added files.

    Args:
        source: the checkpoint to derive from.
        target: directory that already contains the added files.
        dropped: names of `source`'s tensors that the added files replace.
        added: safetensors files in `target` with the new tensors.
        quantization: config.json's new `quantization_config`.

    Returns:
        The new checkpoint, opened and checked against its own index.
    """
    weight_map: dict[str, str] = {}
    headers = {path: read_header(path) for path in added}
    renewed = {name for header in headers.values() for name in header}
    for file in source.files:
        kept = {n for n, r in source.tensors.items() if r.file == file and n not in dropped}
        if kept:
            take_over(source.directory / file, target / file, kept, renewed)
            weight_map |= dict.fromkeys(kept, file)
    records = {name: source.tensors[name] for name in weight_map}
    for path, header in headers.items():
        records |= header
        weight_map |= dict.fromkeys(header, path.name)
    for path in sorted(source.directory.iterdir()):
        if path.suffix in (".json", ".jinja", ".txt") and path.name not in ("config.json", INDEX):
            shutil.copyfile(path, target / path.name)
    size = sum(record.end - record.begin for record in records.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    config = {**source.config, "quantization_config": quantization}
    for name, document in ((INDEX, index), ("config.json", config)):
        write_atomically(target / name, json.dumps(document, indent=2) + "\n")
    return Checkpoint(target)
