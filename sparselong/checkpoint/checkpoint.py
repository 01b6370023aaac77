"""Reading a checkpoint's tensors piece by piece.

Opening a `Checkpoint` decides which files it consists of, and checks that every indexed tensor is
in a shard that exists and is complete (inventory.py); `check` compares names, dtypes and shapes
with the architecture. A damaged download is thus found in the first second, not after an hour of
work. Tensors are then read one layer at a time. derivation.py makes new checkpoints.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open

from sparselong.checkpoint.header import damaged
from sparselong.checkpoint.inventory import take_inventory
from sparselong.checkpoint.slices import file_pieces
from sparselong.errors import StageError
from sparselong.packing import mxfp4

_COMPARED_BYTES = 1 << 24
_SLICE_BYTES = 1 << 26


class Checkpoint:
    """An opened checkpoint directory.

    Args:
        directory: contains config.json and the weights (inventory.py).

    Attributes:
        inventory: the files that are the checkpoint.

    Raises:
        StageError: a file is missing or damaged, index and shards differ, or it is ambiguous which
            files are the checkpoint.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.inventory = take_inventory(directory)
        self.config = self.inventory.config
        self.tensors = self.inventory.tensors

    @property
    def files(self) -> list[str]:
        """Sorted file names of the shards."""
        return self.inventory.files

    @property
    def side_files(self) -> tuple[str, ...]:
        """Sorted names of the tokenizer's and other files that belong to the checkpoint."""
        return self.inventory.side_files

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
                raise damaged(self.directory / file, str(error)) from error
        for name, tensor in tensors.items():
            self._check_finite(name, tensor)
        return tensors

    def _check_finite(self, name: str, tensor: torch.Tensor) -> None:
        bad = 0
        if tensor.is_floating_point() and tensor.numel():
            # One pass, and far faster than to count; NaN is passed on to both.
            if not all(bool(torch.isfinite(limit)) for limit in torch.aminmax(tensor)):
                bad = int((~torch.isfinite(tensor)).sum())
        elif name.endswith("_scales") and tensor.numel():  # an E8M0 scale of 255 means NaN
            if int(tensor.max()) == mxfp4.NAN_SCALE:
                bad = int((tensor == mxfp4.NAN_SCALE).sum())
        if bad:
            raise StageError(
                f"tensor {name} of {self.directory} is damaged",
                "finite values",
                f"{bad} NaN or infinite values",
                "download its shard again",
            )

    def read_slices(
        self, name: str, rows: range | None = None, step: int | None = None
    ) -> Iterator[torch.Tensor]:
        """Yield a large tensor in slices of its first dimension, checked as in `read`.

        Args:
            name: the tensor.
            rows: consecutive rows to read; None reads all. Bytes of others are not read.
            step: rows of a slice; None takes as many as fit in 64 MiB.
        """
        record = self.tensors[name]
        rows = range(record.shape[0]) if rows is None else rows
        if step is None:
            row_bytes = (record.end - record.begin) // max(1, record.shape[0])
            step = max(1, _SLICE_BYTES // max(1, row_bytes))
        path = self.directory / record.file
        try:
            with safe_open(path, framework="pt") as shard:
                stored = shard.get_slice(name)
                for start in range(rows.start, rows.stop, step):
                    part = stored[start : min(rows.stop, start + step)]
                    self._check_finite(name, part)
                    yield part
        except (SafetensorError, OSError) as error:
            raise damaged(path, str(error)) from error

    def read_into(self, target: torch.Tensor, name: str, rows: range) -> None:
        """Read rows of a tensor straight into memory, 64 MiB at a time, checked as in `read`.

        The file is not mapped: nothing depends on it once it is read, and its pages are not
        counted as this process's.

        Args:
            target: CPU tensor of the stored dtype, contiguous.
            name: the tensor.
            rows: consecutive rows, as many as fill `target`.

        Raises:
            StageError: the file is damaged, or was changed while it was read.
        """
        record = self.tensors[name]
        path = self.directory / record.file
        row_bytes = (record.end - record.begin) // max(1, record.shape[0])
        flat = target.view(-1)
        array: Any = flat.view(torch.uint8).numpy()
        memory, done = memoryview(array), 0
        assert len(memory) == len(rows) * row_bytes, name
        try:
            with path.open("rb", buffering=0) as file:
                before = _state(file)
                while done < len(memory):
                    part = memory[done : done + _SLICE_BYTES]
                    place = record.begin + rows.start * row_bytes + done
                    count = os.preadv(file.fileno(), [part], place)
                    if count == 0:
                        raise damaged(path, f"it ends at {place} bytes: truncated")
                    done += count
                if _state(file) != before:
                    raise damaged(path, "it was changed while it was read")
        except OSError as error:
            raise damaged(path, str(error)) from error
        for part in flat.split(_SLICE_BYTES):
            self._check_finite(name, part)

    def read_rows(self, name: str, wanted: torch.Tensor) -> torch.Tensor:
        """Return rows [n, …] of a large tensor; `wanted` is sorted and has no duplicates."""
        parts, start = [], 0
        for part in self.read_slices(name):
            here = wanted[(wanted >= start) & (wanted < start + len(part))]
            parts.append(part[here - start])
            start += len(part)
        return torch.cat(parts)


def _state(file: IO[bytes]) -> tuple[int, int]:
    """Return what tells whether a file was changed."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file atomically, and hold no copy of its tensors meanwhile."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        for piece in file_pieces(tensors):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def same_bytes(left: Checkpoint, right: Checkpoint, name: str) -> bool:
    """Return whether a tensor's stored bytes are identical in two checkpoints."""
    a, b = left.tensors[name], right.tensors[name]
    path_a, path_b = left.directory / a.file, right.directory / b.file
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if a.begin == b.begin and os.path.samefile(path_a, path_b):
        return True
    with path_a.open("rb") as file_a, path_b.open("rb") as file_b:
        return _is_same(file_a, a.begin, file_b, b.begin, a.end - a.begin)


def same_rows(part: Checkpoint, whole: Checkpoint, name: str, rows: list[int]) -> bool:
    """Return whether a tensor's stored bytes are those of some rows of another checkpoint's.

    Args:
        part: its tensor has as many rows as are listed.
        whole: its tensor has all of them.
        name: the tensor.
        rows: their places in the whole, in order.
    """
    a, b = part.tensors[name], whole.tensors[name]
    if (a.dtype, a.shape) != (b.dtype, (len(rows), *b.shape[1:])):
        return False
    size = (b.end - b.begin) // b.shape[0]
    with (
        (part.directory / a.file).open("rb") as file_a,
        (whole.directory / b.file).open("rb") as file_b,
    ):
        return all(
            _is_same(file_a, a.begin + place * size, file_b, b.begin + row * size, size)
            for place, row in enumerate(rows)
        )


def _is_same(file_a: IO[bytes], begin_a: int, file_b: IO[bytes], begin_b: int, size: int) -> bool:
    """Return whether two files have the same bytes from two places on."""
    file_a.seek(begin_a)
    file_b.seek(begin_b)
    while size:
        count = min(size, _COMPARED_BYTES)
        if file_a.read(count) != file_b.read(count):
            return False
        size -= count
    return True
