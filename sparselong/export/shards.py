"""Writing a model's safetensors files one by one, each read back before it gets its name.

A file is written as NAME.partial, tensor by tensor in slices, and hashed on the way. Then it is
read from disk and every tensor compared with its source, which is read and decoded again. Only then
is it renamed and recorded in written.json. After an interruption, recorded files are kept. A file
whose writing fails, for example because the disk is full, is removed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sparselong.checkpoint import (
    CONFIG,
    INDEX,
    Checkpoint,
    Entry,
    Shapes,
    make_header,
    read_header,
)
from sparselong.errors import StageError
from sparselong.figures import format_bytes
from sparselong.files import copy_atomically, read_json, write_atomically
from sparselong.provenance import are_rows, describe_files, refuse_changes
from sparselong.run import Stage

SHARD_BYTES = 4_000_000_000
"""Bytes from which on a file is full; one larger tensor has a file of its own."""
WRITTEN = "written.json"
_BYTES = {"BF16": 2, "U8": 1}
_DTYPES = {"BF16": torch.bfloat16, "U8": torch.uint8}
Parts = Callable[[str], Iterator[torch.Tensor]]
"""Function from a tensor's name to its slices along the first dimension, in order."""


def count_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor."""
    return math.prod(shape) * _BYTES[dtype]


def plan_shards(shapes: Shapes, limit_bytes: int | None = None) -> dict[str, Shapes]:
    """Return which tensors each file holds, by file name; in the order of `shapes`.

    Args:
        shapes: safetensors dtype and shape by name.
        limit_bytes: most bytes of a file; None takes SHARD_BYTES.
    """
    limit = SHARD_BYTES if limit_bytes is None else limit_bytes
    groups: list[Shapes] = []
    room = 0
    for name, (dtype, shape) in shapes.items():
        size = count_bytes(dtype, shape)
        if not groups or size > room:
            groups.append({})
            room = limit
        groups[-1][name] = dtype, shape
        room -= size
    count = len(groups)
    return {f"model-{n:05d}-of-{count:05d}.safetensors": g for n, g in enumerate(groups, start=1)}


def write_shards(stage: Stage, shards: Mapping[str, Shapes], parts: Parts) -> None:
    """Write the files that are not recorded as written yet, and compare each with its source.

    Args:
        stage: the part; files go to its directory.
        shards: result of `plan_shards`.
        parts: gives a tensor's slices; called twice for each tensor.

    Raises:
        StageError: the disk has too little space, a file that was written has changed since, or one
            reads differently than it was written.
    """
    rows = _read_written(stage)
    left = [file for file in shards if file not in rows]
    check_space(stage, sum(count_bytes(*one) for file in left for one in shards[file].values()))
    stage.report("file", len(shards) - len(left), len(shards))
    for number, file in enumerate(left, start=1 + len(shards) - len(left)):
        rows[file] = _write_shard(stage.dir / file, shards[file], parts)
        _record(stage, rows)
        size = format_bytes(rows[file]["bytes"])
        stage.log(f"{file} ({number} of {len(shards)}): {size} written and read back")
        stage.report("file", number, len(shards))
    stage.described += [{**row, "path": str((stage.dir / name).absolute())}
                        for name, row in rows.items()]  # fmt: skip


def _read_written(stage: Stage) -> dict[str, dict[str, Any]]:
    """Return rows of the files that are complete, after comparing them with the disk."""
    path = stage.dir / WRITTEN
    if not path.exists():
        return {}
    fix = f"redo the export: {stage.redo_command}"
    files = read_json(path, fix).get("files")
    if not isinstance(files, list) or not are_rows(files):
        raise StageError(f"{path} is damaged", "rows of the files that are complete", "none", fix)
    refuse_changes(files, stage.dir, stage.name, fix)
    return {row["path"]: row for row in files}


def _record(stage: Stage, rows: Mapping[str, dict[str, Any]]) -> None:
    """Write which files are complete; those that are not listed may be a person's."""
    document = {"files": list(rows.values())}
    write_atomically(stage.dir / WRITTEN, json.dumps(document, indent=1) + "\n")


def check_space(stage: Stage, needed: int) -> None:
    """Raise StageError if the disk of the export has less space than `needed` bytes."""
    free = shutil.disk_usage(stage.dir).free
    if free < needed:
        raise StageError(
            f"the disk of {stage.dir} has too little space for {stage.part}",
            format_bytes(needed),
            format_bytes(free),
            "free some space, or use a --run-dir on another disk",
        )


def _write_shard(path: Path, shapes: Shapes, parts: Parts) -> dict[str, Any]:
    """Write one file, compare it with its source and name it; return its row for written.json."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        digest = _stream(partial, shapes, parts)
        _read_back(partial, shapes, parts)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    status = path.stat()
    return {
        "path": path.name,
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "sha256": digest,
    }


def _stream(path: Path, shapes: Shapes, parts: Parts) -> str:
    """Write a safetensors file tensor by tensor, bf16 first, and return its sha256."""
    order = sorted(shapes, key=lambda name: (-_BYTES[shapes[name][0]], name))
    header = make_header((n, Entry(*shapes[n], count_bytes(*shapes[n]))) for n in order)
    digest = hashlib.sha256(header)
    with path.open("wb") as file:
        file.write(header)
        for name in order:
            for part in parts(name):
                data = _as_bytes(name, part, shapes).numpy()
                file.write(data)  # pyright: ignore[reportArgumentType]
                digest.update(data)  # pyright: ignore[reportArgumentType]
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _read_back(path: Path, shapes: Shapes, parts: Parts) -> None:
    """Raise unless every tensor of a file has its source's dtype, shape and bytes."""
    records = read_header(path)
    found = {name: (record.dtype, record.shape) for name, record in records.items()}
    differing = [name for name in shapes if found.get(name) != (shapes[name][0], shapes[name][1])]
    with path.open("rb") as file:
        for name in () if differing else shapes:
            file.seek(records[name].begin)
            for part in parts(name):
                data = _as_bytes(name, part, shapes)
                read = torch.empty_like(data)
                count = file.readinto(read.numpy())  # pyright: ignore[reportArgumentType]
                if count != data.numel() or not torch.equal(read, data):
                    differing.append(name)
                    break
    if differing or found.keys() != shapes.keys():
        raise StageError(
            f"{path.name} does not read as it was written",
            f"{len(shapes)} tensors with the values of their sources",
            f"other values in {', '.join(differing[:4]) or 'other tensors'}",
            "check the disk and the memory of this machine, then run the same command again",
        )


def _as_bytes(name: str, part: torch.Tensor, shapes: Shapes) -> torch.Tensor:
    dtype, shape = shapes[name]
    if part.dtype != _DTYPES[dtype] or part.shape[1:] != shape[1:]:
        raise ValueError(f"{name}: {part.dtype} {list(part.shape)}; allowed: {dtype} {list(shape)}")
    return part.contiguous().reshape(-1).view(torch.uint8)


def write_side_files(
    stage: Stage, source: Checkpoint, shards: Mapping[str, Shapes], config: Mapping[str, Any]
) -> None:
    """Write tokenizer and other side files, the index, and config.json last.

    Args:
        stage: the part; files go to its directory.
        source: the model that is exported; its side files are copied.
        shards: the weight files and their tensors.
        config: content of config.json.
    """
    for name in source.side_files:
        target = stage.dir / name
        target.parent.mkdir(exist_ok=True)
        copy_atomically(source.directory / name, target)
    copies = describe_files([stage.dir / name for name in source.side_files], stage.dir)
    _record(stage, {**_read_written(stage), **{row["path"]: row for row in copies}})
    tensors = {name: one for shapes in shards.values() for name, one in shapes.items()}
    index = {
        "metadata": {"total_size": sum(count_bytes(*one) for one in tensors.values())},
        "weight_map": {name: file for file, shapes in shards.items() for name in shapes},
    }
    for name, document in ((INDEX, index), (CONFIG, config)):
        write_atomically(stage.dir / name, json.dumps(document, indent=2) + "\n")
