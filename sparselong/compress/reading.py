"""Reading the base beside the computation: the next layer's tensors, and the hashes of its files.

A layer is read while the one before is compressed. On a machine with a GPU it is read into
page-locked memory, which the GPU copies at full rate and which the layer after takes over.

Hashing 65 GB takes as long as compressing them, so it is done beside as well, in the order in which
layers need the files. A layer is finished only after its files are hashed and recorded
(`BaseFiles.settle`): layers that an interruption separates are of the same base.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import GptOssConfig

from sparselong.checkpoint import CONFIG, Checkpoint, check_recorded, layer_tensors
from sparselong.compress.background import Background, Seconds
from sparselong.compress.finished import read_own
from sparselong.errors import StageError
from sparselong.files import write_atomically
from sparselong.provenance import describe_files
from sparselong.runtime import allocate_locked

BASE_RECORD = "base.json"
_DTYPES = {"BF16": torch.bfloat16, "U8": torch.uint8}
_ALIGNMENT = 64
_LAYERS = "model.layers."


class LayerReader:
    """Reads layers, one ahead of the computation.

    Args:
        base: the checkpoint.
        architecture: its architecture.
        device: where the layers are computed.
    """

    def __init__(self, base: Checkpoint, architecture: GptOssConfig, device: torch.device):
        self._base, self._architecture = base, architecture
        self._is_locked = device.type == "cuda"
        self._memory: torch.Tensor | None = None
        self._thread = Background()

    def begin(self, index: int) -> None:
        """Begin to read a layer. On a machine with a GPU this overwrites the one taken before."""
        self._thread.start(self._read, index)

    def take(self) -> tuple[dict[str, torch.Tensor], float]:
        """Return the tensors of the layer begun last by full name, on the CPU, and its seconds.

        Raises:
            StageError: a file is damaged, or a tensor contains NaN or infinity.
        """
        return self._thread.join()

    def __enter__(self) -> LayerReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.__exit__(kind, error, trace)

    def _read(self, index: int) -> tuple[dict[str, torch.Tensor], float]:
        seconds, shapes = Seconds(), layer_tensors(self._architecture, index)
        with seconds.measuring("read"):
            records = self._base.tensors
            names = sorted(shapes, key=lambda name: (records[name].file, records[name].begin))
            sizes = [records[name].end - records[name].begin for name in names]
            memory = self._reserve(sum(size + _ALIGNMENT for size in sizes))
            tensors, begin = {}, 0
            for name, size in zip(names, sizes, strict=True):
                dtype, shape = shapes[name]
                tensors[name] = memory[begin : begin + size].view(_DTYPES[dtype]).view(shape)
                self._base.read_into(tensors[name], name, range(shape[0]))
                begin += -(-size // _ALIGNMENT) * _ALIGNMENT
        return tensors, seconds.by_part["read"]

    def _reserve(self, size_bytes: int) -> torch.Tensor:
        """Return memory for a layer; page-locked memory is kept for the layers after it."""
        if not self._is_locked:
            return torch.empty(size_bytes, dtype=torch.uint8)
        if self._memory is None or len(self._memory) < size_bytes:
            self._memory = allocate_locked(size_bytes)
        return self._memory


class BaseFiles:
    """Hashes of the base's files, made beside the work and recorded in base.json.

    Args:
        base: the opened checkpoint.
        folder: stage 02's directory.
        run_dir: the rows' paths are relative to it.

    Attributes:
        rows: rows of `describe_files` of the recorded files.
        seconds: what hashing them took.

    Raises:
        StageError: a recorded file of the base has changed since, or the record is damaged.
    """

    def __init__(self, base: Checkpoint, folder: Path, run_dir: Path):
        self._base, self._path, self._run_dir = base, folder / BASE_RECORD, run_dir
        self.rows: list[dict[str, Any]] = []
        self.seconds = 0.0
        if self._path.exists():
            record = read_own(self._path, "files", "seconds")
            self.rows, self.seconds = record["files"], record["seconds"]
        check_recorded(base.inventory, self.rows, folder.name, is_whole=False)
        recorded, needed = self._recorded_names(), _first_layers(base)
        names = sorted(base.inventory.names, key=lambda name: needed.get(name, -1))
        self._needed = {
            base.directory / name: needed.get(name, -1) for name in names if name not in recorded
        }
        self._before = {path: _state(path) for path in self._needed}
        self._pool = ThreadPoolExecutor(1)
        self._pending: dict[Path, Future[tuple[dict[str, Any], float]]] = {}

    def begin(self) -> None:
        """Begin to hash the files that are not recorded yet."""
        self._pending = {path: self._pool.submit(self._hash, path) for path in self._before}

    @property
    def unrecorded_bytes(self) -> int:
        """Bytes of the files that are not recorded yet."""
        return sum(size for size, _ in self._before.values())

    def settle(self, layer: int | None = None) -> None:
        """Wait until the files up to a layer's are hashed, and record them; None: all files.

        Raises:
            StageError: a file was changed since it was opened.
        """
        done = []
        for path in list(self._pending):
            if layer is not None and self._needed[path] > layer:
                break
            row, seconds = self._pending.pop(path).result()
            if (row["bytes"], row["mtime_ns"]) != self._before[path]:
                raise StageError(
                    f"{path} has changed since {self._path.parent.name} opened it",
                    "{} bytes, modified at {} ns".format(*self._before[path]),
                    f"{row['bytes']} bytes, modified at {row['mtime_ns']} ns",
                    f"restore it, and redo the stage: python {self._path.parent.name}.py --force",
                )
            done.append(row)
            self.seconds += seconds
        if done:
            self.rows += done
            document = {"files": self.rows, "seconds": self.seconds}
            write_atomically(self._path, json.dumps(document, indent=1) + "\n")

    def __enter__(self) -> BaseFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _recorded_names(self) -> set[str]:
        """Return the recorded files' names in the base's directory, which may have been moved."""
        paths = [Path(row["path"]) for row in self.rows]
        folder = next((path.parent for path in paths if path.name == CONFIG), None)
        return {str(p.relative_to(folder)) for p in paths if folder and p.is_relative_to(folder)}

    def _hash(self, path: Path) -> tuple[dict[str, Any], float]:
        begun = time.perf_counter()
        (row,) = describe_files([path], self._run_dir)
        return row, time.perf_counter() - begun


def _first_layers(base: Checkpoint) -> dict[str, int]:
    """Return the first layer that needs each shard; -1 for one that is needed from the start."""
    first: dict[str, int] = {}
    for name, record in base.tensors.items():
        layer = int(name.split(".")[2]) if name.startswith(_LAYERS) else -1
        first[record.file] = min(layer, first.get(record.file, layer))
    return first


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
