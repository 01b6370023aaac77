"""Independent reading of a checkpoint folder, and the edits that mutations are made of.

Only json, hashlib, torch and the safetensors package read here: none of this project's own readers.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def hash_tree(folder: Path) -> str:
    """Hash names, kinds, link targets and contents of everything in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        kind = "link" if path.is_symlink() else "folder" if path.is_dir() else "file"
        digest.update(f"{path.relative_to(folder)} {kind}\n".encode())
        if kind == "link":
            digest.update(str(path.readlink()).encode())
        elif kind == "file":
            digest.update(path.read_bytes())
    return digest.hexdigest()


def read_tensors(folder: Path) -> dict[str, str]:
    """Map each tensor's name to a hash of its dtype, shape and bytes, by the index if there is one.

    Raises whatever json and safetensors raise: only called for folders that were accepted.
    """
    index = folder / INDEX
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
    else:
        with safe_open(folder / SINGLE, "np") as file:
            weight_map = dict.fromkeys(file.keys(), SINGLE)
    hashes = {}
    for name, shard in weight_map.items():
        with safe_open(folder / shard, "pt") as file:
            tensor = file.get_tensor(name)
        shape = f"{tensor.dtype} {list(tensor.shape)} "
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        hashes[name] = hashlib.sha256(shape.encode() + data).hexdigest()
    return hashes


def rewrite(path: Path, data: bytes) -> None:
    """Replace a file, whatever it was (also a link), by another one with this content."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    """Rewrite a JSON file; `change` works in place or returns another document."""
    document = json.loads(path.read_text())
    changed = change(document)
    rewrite(path, json.dumps(document if changed is None else changed, indent=1).encode())


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header and the data of a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(header: dict[str, Any] | str, data: bytes) -> bytes:
    """Return a safetensors file of a header (or its text) and data."""
    raw = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite a safetensors file's header in place, keeping its data."""
    header, data = split(path)
    changed = change(header)
    rewrite(path, join(header if changed is None else changed, data))


def shards(folder: Path) -> list[Path]:
    """Return the shards of a sharded checkpoint."""
    return sorted(folder.glob("model-*.safetensors"))


def collect(folder: Path) -> dict[str, tuple[dict[str, Any], bytes]]:
    """Return each tensor's header entry and bytes."""
    found = {}
    for path in shards(folder):
        header, data = split(path)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            found[name] = (entry, data[begin:end])
    return found


def pack(tensors: dict[str, tuple[dict[str, Any], bytes]]) -> bytes:
    """Return one safetensors file of such tensors, in the given order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts, offset = [], 0
    for name, (entry, data) in tensors.items():
        header[name] = {**entry, "data_offsets": [offset, offset + len(data)]}
        parts.append(data)
        offset += len(data)
    return join(header, b"".join(parts))
