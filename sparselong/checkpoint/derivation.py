"""Deriving a checkpoint from another: unchanged tensors are linked or copied, the rest replaced.

A derived checkpoint reuses the shards that it does not change. A shard is hard-linked if the file
system allows it, even if other files replace up to 5 % of its bytes: the published 120b interleaves
attention (2.9 % of a shard) with experts, and linking saves 61 GB there. transformers loads every
tensor of a shard, so a shard is not linked if another file holds a new tensor under the name of a
replaced one. Other replaced tensors have names that the model lacks, and the quantizer ignores
them. A shard that is not linked is copied in a stream, without its replaced tensors.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sparselong.checkpoint.checkpoint import Checkpoint
from sparselong.checkpoint.header import TensorRecord, damaged, read_header
from sparselong.checkpoint.inventory import CONFIG, INDEX, SINGLE, STALE
from sparselong.checkpoint.slices import Entry, make_header
from sparselong.files import link_file, write_atomically

_LINKED_STALE_SHARE = 0.05
_COPY_BYTES = 1 << 24


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
    stale = set(records) - kept
    is_harmless = not stale & renewed and all(STALE.search(name) for name in stale)
    partial = target.with_name(target.name + ".partial")
    partial.unlink(missing_ok=True)
    if is_harmless and stale_bytes <= _LINKED_STALE_SHARE * source.stat().st_size:
        if link_file(source, partial):
            partial.replace(target)
            return
    _copy_tensors(source, partial, {name: r for name, r in records.items() if name in kept})
    partial.replace(target)


def _copy_tensors(source: Path, target: Path, records: dict[str, TensorRecord]) -> None:
    """Stream tensors into a new safetensors file, byte for byte, in their original order."""
    ordered = sorted(records.items(), key=lambda item: item[1].begin)
    header = make_header((n, Entry(r.dtype, r.shape, r.end - r.begin)) for n, r in ordered)
    with _reading(source), source.open("rb") as reader, target.open("wb") as writer:
        writer.write(header)
        for _, record in ordered:
            reader.seek(record.begin)
            left = record.end - record.begin
            while left:
                chunk = reader.read(min(left, _COPY_BYTES))
                if not chunk:
                    raise damaged(source, f"{left} bytes fewer than when it was opened")
                writer.write(chunk)
                left -= len(chunk)
        writer.flush()
        os.fsync(writer.fileno())


def derive(
    source: Checkpoint,
    target: Path,
    dropped: set[str],
    added: Iterable[Path],
    quantization: dict[str, Any],
    changed: Mapping[str, Any] = MappingProxyType({}),
) -> Checkpoint:
    """Complete `target` as a copy of `source` with some tensors replaced by added files.

    Args:
        source: the checkpoint to derive from.
        target: directory that already contains the added files.
        dropped: names of `source`'s tensors that the added files replace.
        added: safetensors files in `target` with the new tensors.
        quantization: config.json's new `quantization_config`.
        changed: other keys of config.json that are new, or have other values.

    Returns:
        The new checkpoint, opened and checked against its own index.
    """
    weight_map: dict[str, str] = {}
    headers = {path: read_header(path) for path in added}
    renewed = {name for header in headers.values() for name in header}
    targets = _target_names(source.files, {path.name for path in headers})
    for file in source.files:
        kept = {n for n, r in source.tensors.items() if r.file == file and n not in dropped}
        if kept:
            take_over(source.directory / file, target / targets[file], kept, renewed)
            weight_map |= dict.fromkeys(kept, targets[file])
    records = {name: source.tensors[name] for name in weight_map}
    for path, header in headers.items():
        records |= header
        weight_map |= dict.fromkeys(header, path.name)
    for name in source.side_files:
        (target / name).parent.mkdir(exist_ok=True)
        with _reading(source.directory / name):
            shutil.copyfile(source.directory / name, target / name)
    size = sum(record.end - record.begin for record in records.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    config = {**source.config, **changed, "quantization_config": quantization}
    for name, document in ((INDEX, index), (CONFIG, config)):
        write_atomically(target / name, json.dumps(document, indent=2) + "\n")
    return Checkpoint(target)


def _target_names(files: list[str], taken: set[str]) -> dict[str, str]:
    """Return a name in the derived checkpoint for each shard.

    The name of a whole model's single file would make transformers ignore the index, and a name of
    an added file would be overwritten.
    """
    names = {}
    for number, file in enumerate(files, start=1):
        clashes = file == SINGLE or file in taken
        names[file] = f"model-{number:05d}-of-{len(files):05d}.safetensors" if clashes else file
    if len(set(names.values())) < len(files):
        names = {
            file: f"model-{number:05d}-of-{len(files):05d}.safetensors"
            for number, file in enumerate(files, start=1)
        }
    return names


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    """Raise StageError if the source cannot be opened; other failures are left to the caller."""
    try:
        yield
    except OSError as error:
        if error.filename != str(source):
            raise
        raise damaged(source, error.strerror or str(error), "a file that can be read") from error
