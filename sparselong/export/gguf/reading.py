"""Comparing a GGUF file with its source: keys, and every tensor as its readers decode it.

The package's own reader gives keys, names, types, shapes and places. Tensors are then read in
slices, because the reader maps the file into memory. All bytes are compared with those that the
source, read again, gives. The package decodes the first rows of each slice, which must be the
source's values, and all rows of types that are not exact, whose errors are measured.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import torch

from sparselong.errors import StageError
from sparselong.export.gguf.encoding import Slice, encoded_parts
from sparselong.export.gguf.file import Layout
from sparselong.export.gguf.types import EXACT
from sparselong.export.source import Source

_DECODED_ROWS = 8
_ROUNDING = 1e-6  # of a quotient in fp32
Errors = dict[str, dict[str, float]]


def compare_file(path: Path, source: Source, layout: Layout) -> tuple[str, Errors]:
    """Return a file's sha256 and the errors of the tensors whose type is not exact.

    Args:
        path: the file.
        source: the model.
        layout: what it should hold.

    Returns:
        sha256, and by tensor `relative_rms`, `largest` and, for Q8_0, `largest_in_steps`.

    Raises:
        StageError: a key, a type, a shape or a value is not that of the source.
    """
    differing = _compare_header(path, layout)
    errors: Errors = {}
    digest = hashlib.sha256()
    if not differing:
        with path.open("rb") as file:
            digest.update(file.read(len(layout.header)))
            for tensor, begin in zip(layout.tensors, layout.begins, strict=True):
                digest.update(file.read(begin - file.tell()))
                meter = _Meter(tensor.kind)
                parts = encoded_parts(source, tensor)
                if not all(_is_same(file, part, meter, digest) for part in parts):
                    differing.append(tensor.name)
                    break
                if tensor.kind not in EXACT:
                    errors[tensor.name] = meter.summarize()
            digest.update(file.read())
    if differing:
        raise StageError(
            f"{path.name} does not read as it was written",
            f"{len(layout.tensors)} tensors with the values of their sources",
            f"differences in {', '.join(differing[:4])}",
            "check the disk and the memory of this machine, then run the same command again",
        )
    return digest.hexdigest(), errors


def _compare_header(path: Path, layout: Layout) -> list[str]:
    """Return names of the keys and tensors that the package reads otherwise than planned."""
    if path.stat().st_size != layout.size:
        return [f"its size: {path.stat().st_size} bytes, not {layout.size}"]
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError) as error:
        return [f"its header: {error}"]
    fields = {key: one for key, one in reader.fields.items() if not key.startswith("GGUF.")}
    differing = sorted(fields.keys() ^ layout.keys.keys())
    differing += [key for key in fields.keys() & layout.keys.keys()
                  if not _same(fields[key].contents(), layout.keys[key])]  # fmt: skip
    found = [
        (one.name, one.tensor_type.name, tuple(int(n) for n in reversed(one.shape)),
         int(one.data_offset))
        for one in reader.tensors
    ]  # fmt: skip
    wanted = [
        (one.name, one.kind, one.shape, begin)
        for one, begin in zip(layout.tensors, layout.begins, strict=True)
    ]
    return differing + sorted({each[0] for each in set(found) ^ set(wanted)})


def _same(found: Any, wanted: Any) -> bool:
    """Return whether a key has its value; floats are stored in fp32."""
    if isinstance(wanted, float):
        return found == torch.tensor(wanted, dtype=torch.float32).item()
    return found == wanted


def _is_same(file: BinaryIO, part: Slice, meter: _Meter, digest: Any) -> bool:
    """Return whether the next bytes of a file are a slice's and decode to its values."""
    found = torch.empty_like(part.data)
    count = file.readinto(found.numpy())  # pyright: ignore
    digest.update(found.numpy())
    if count != found.numel() or not torch.equal(found, part.data):
        return False
    if meter.kind not in EXACT:
        meter.add(found, _decode(found, meter.kind), part.values(len(found)))
        return meter.is_within_limit()
    # Not bit for bit: llama.cpp decodes MXFP4's code of -0 to 0.
    return torch.equal(_decode(found[:_DECODED_ROWS], meter.kind), part.values(_DECODED_ROWS))


def _decode(rows: torch.Tensor, kind: str) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(rows.numpy(), gguf.GGMLQuantizationType[kind]))


class _Meter:
    """The error of a tensor whose type is not exact, over its slices."""

    def __init__(self, kind: str):
        self.kind = kind
        self._squares = self._error_squares = self._largest = self._steps = 0.0

    def add(self, rows: torch.Tensor, decoded: torch.Tensor, values: torch.Tensor) -> None:
        """Measure a slice.

        Args:
            rows: uint8 [rows, bytes of a row], as the file has them.
            decoded: fp32 [rows, columns].
            values: fp32 [rows, columns].
        """
        error = (decoded - values).abs_()
        self._squares += float(values.square().sum(dtype=torch.float64))
        self._error_squares += float(error.square().sum(dtype=torch.float64))
        self._largest = max(self._largest, float(error.max()))
        if self.kind == "Q8_0":
            step = rows.view(len(rows), -1, 34)[..., :2].contiguous().view(torch.float16).float()
            steps = error.view(len(rows), -1, 32) / torch.where(step == 0, torch.inf, step)
            self._steps = max(self._steps, float(steps.max()))

    def is_within_limit(self) -> bool:
        """Return whether each value of a Q8_0 tensor is within half a step; true of others."""
        return self._steps <= 0.5 * (1 + _ROUNDING)

    def summarize(self) -> dict[str, float]:
        """Return what was measured."""
        relative = (self._error_squares / self._squares) ** 0.5 if self._squares else 0.0
        found = {"relative_rms": relative, "largest": self._largest}
        return {**found, "largest_in_steps": self._steps} if self.kind == "Q8_0" else found
