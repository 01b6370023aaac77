"""Changes of a checkpoint folder that mutations are made of: each is called with folder and rng."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.inputs.mutations.folder import (
    INDEX,
    SINGLE,
    collect,
    edit_header,
    edit_json,
    join,
    pack,
    rewrite,
    shards,
    split,
)


def config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, random.Random], None]:
    return lambda folder, rng: edit_json(folder / "config.json", change)


def set_key(key: str, value: Any) -> Callable[[Path, random.Random], None]:
    def change(document: dict[str, Any]) -> None:
        *parents, last = key.split(".")
        for parent in parents:
            document = document[parent]
        document[last] = value

    return config(change)


def remove(key: str) -> Callable[[Path, random.Random], None]:
    def change(document: dict[str, Any]) -> None:
        *parents, last = key.split(".")
        for parent in parents:
            document = document[parent]
        del document[last]

    return config(change)


def shuffled(document: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    items = list(document.items())
    rng.shuffle(items)
    return dict(items)


def tensor_of(folder: Path, rng: random.Random, ends: tuple[str, ...]) -> tuple[Path, str]:
    found = [(p, n) for p in shards(folder) for n in split(p)[0] if n.endswith(ends)]
    return rng.choice(sorted(found))


def change_bytes(ends: tuple[str, ...], values: bytes, width: int = 1):
    """Overwrite one element of a tensor whose name ends so."""

    def change(folder: Path, rng: random.Random) -> None:
        path, name = tensor_of(folder, rng, ends)
        header, data = split(path)
        begin, end = header[name]["data_offsets"]
        place = begin + rng.randrange((end - begin) // width) * width
        new = bytes(rng.choice(values) for _ in range(width)) if width == 1 else values
        if data[place : place + width] == new:
            new = bytes([new[0] ^ 1]) + new[1:]
        rewrite(path, join(header, data[:place] + new + data[place + width :]))

    return change


def merge(folder: Path, rng: random.Random) -> None:
    everything = pack(shuffled(collect(folder), rng))
    for path in [*shards(folder), folder / INDEX]:
        path.unlink()
    (folder / SINGLE).write_bytes(everything)


def reshard(folder: Path, rng: random.Random) -> None:
    tensors, count = shuffled(collect(folder), rng), rng.randint(1, 6)
    for path in shards(folder):
        path.unlink()
    parts: list[dict[str, Any]] = [{} for _ in range(count)]
    for position, (name, entry) in enumerate(tensors.items()):
        parts[position % count][name] = entry
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{count:05d}.safetensors"
        (folder / file).write_bytes(pack(part))
        weight_map |= dict.fromkeys(part, file)
    rewrite(folder / INDEX, json.dumps({"weight_map": weight_map}).encode())


def reorder_header(folder: Path, rng: random.Random) -> None:
    edit_header(rng.choice(shards(folder)), lambda header: shuffled(header, rng))


def pad_header(folder: Path, rng: random.Random) -> None:
    path = rng.choice(shards(folder))
    header, data = split(path)
    rewrite(path, join(json.dumps(header) + " " * 8 * rng.randint(1, 9), data))


def as_snapshot(folder: Path, rng: random.Random) -> None:
    blobs = folder.parent / f"{folder.name}-blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(p for p in folder.iterdir() if p.is_file())):
        path.rename(blobs / f"{number:064d}")
        path.symlink_to(Path("..") / blobs.name / f"{number:064d}")


def add(name: str, content: bytes) -> Callable[[Path, random.Random], None]:
    def change(folder: Path, rng: random.Random) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        rewrite(folder / name, content)

    return change


def cut(pattern: str) -> Callable[[Path, random.Random], None]:
    def change(folder: Path, rng: random.Random) -> None:
        path = rng.choice(sorted(folder.glob(pattern)))
        data = path.read_bytes()
        rewrite(path, data[: rng.randrange(len(data))])

    return change


def replace(pattern: str, content: bytes) -> Callable[[Path, random.Random], None]:
    return lambda folder, rng: rewrite(rng.choice(sorted(folder.glob(pattern))), content)


def delete(pattern: str) -> Callable[[Path, random.Random], None]:
    return lambda folder, rng: rng.choice(sorted(folder.glob(pattern))).unlink()


def swap(folder: Path, rng: random.Random) -> None:
    one, other = rng.sample(shards(folder), 2)
    first, second = one.read_bytes(), other.read_bytes()
    rewrite(one, second)
    rewrite(other, first)


def dead(pattern: str) -> Callable[[Path, random.Random], None]:
    def change(folder: Path, rng: random.Random) -> None:
        path = rng.choice(sorted(folder.glob(pattern)))
        path.unlink()
        path.symlink_to("../blobs/gone")

    return change


def index(change: Callable[[dict[str, str], random.Random], Any]):
    def apply(folder: Path, rng: random.Random) -> None:
        edit_json(folder / INDEX, lambda document: change(document["weight_map"], rng))

    return apply


def drop_entry(weight_map: dict[str, str], rng: random.Random) -> None:
    del weight_map[rng.choice(sorted(weight_map))]


def redirect_entry(weight_map: dict[str, str], rng: random.Random) -> None:
    name = rng.choice(sorted(weight_map))
    weight_map[name] = rng.choice(sorted(set(weight_map.values()) - {weight_map[name]}))


def point_to(target: Any):
    def change(weight_map: dict[str, str], rng: random.Random) -> None:
        weight_map[rng.choice(sorted(weight_map))] = target

    return index(change)


def repeat_key(file: str, key: str, value: Any) -> Callable[[Path, random.Random], None]:
    """Write a key a second time, with another value, at the start of a JSON object's text."""

    def change(folder: Path, rng: random.Random) -> None:
        text = (folder / file).read_text()
        at = text.index("{", text.index("weight_map")) if file == INDEX else text.index("{")
        added = f"{json.dumps(key)}: {json.dumps(value)}, "
        rewrite(folder / file, (text[: at + 1] + added + text[at + 1 :]).encode())

    return change


def repeat_header_entry(folder: Path, rng: random.Random) -> None:
    path = rng.choice(shards(folder))
    header, data = split(path)
    name = rng.choice(sorted(set(header) - {"__metadata__"}))
    entry = {**header[name], "data_offsets": [0, 0], "shape": [0]}
    text = f"{{{json.dumps(name)}: {json.dumps(entry)}, {json.dumps(header)[1:]}"
    rewrite(path, join(text, data))


def entry(change: Callable[[dict[str, Any], random.Random], None]):
    def apply(folder: Path, rng: random.Random) -> None:
        def edit(header: dict[str, Any]) -> None:
            change(header[rng.choice(sorted(set(header) - {"__metadata__"}))], rng)

        edit_header(rng.choice(shards(folder)), edit)

    return apply


def shift(entry: dict[str, Any], rng: random.Random) -> None:
    by = rng.choice((-2, 2, 64, -(1 << 40), 1 << 40))
    entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]


def reshape(entry: dict[str, Any], rng: random.Random) -> None:
    entry["shape"] = rng.choice(([*entry["shape"], 2], [1, 1, *entry["shape"]], [-1], "8", [0.5]))


def retype(entry: dict[str, Any], rng: random.Random) -> None:
    entry["dtype"] = rng.choice(("F32", "F16" if entry["dtype"] == "BF16" else "I8", "X", 7, None))


def rename(folder: Path, rng: random.Random) -> None:
    path, name = tensor_of(folder, rng, ("weight", "bias"))
    new = name.replace("model", "modell") if "model" in name else f"{name}_"

    def edit(header: dict[str, Any]) -> dict[str, Any]:
        return {(new if key == name else key): value for key, value in header.items()}

    edit_header(path, edit)
    edit_json(folder / INDEX, lambda d: d["weight_map"].update({new: d["weight_map"].pop(name)}))


def remove_tensor(folder: Path, rng: random.Random) -> None:
    path, name = tensor_of(folder, rng, ("weight", "bias", "blocks", "scales", "sinks"))
    edit_header(path, lambda header: {k: v for k, v in header.items() if k != name})
    edit_json(folder / INDEX, lambda d: d["weight_map"].pop(name) and None)


def length(folder: Path, rng: random.Random) -> None:
    path = rng.choice(shards(folder))
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    new = rng.choice((0, 1, length - 1, length + 1, 1 << 62, (1 << 64) - 1))
    rewrite(path, struct.pack("<Q", new) + raw[8:])


def flip_header_byte(folder: Path, rng: random.Random) -> None:
    path = rng.choice(shards(folder))
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", bytes(raw[:8]))
    raw[8 + rng.randrange(length)] ^= 1 << rng.randrange(7)
    rewrite(path, bytes(raw))


def flip_json_byte(file: str) -> Callable[[Path, random.Random], None]:
    def change(folder: Path, rng: random.Random) -> None:
        raw = bytearray((folder / file).read_bytes())
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(7)
        rewrite(folder / file, bytes(raw))

    return change


def stale_single(folder: Path, rng: random.Random) -> None:
    tensors = dict(collect(folder))
    name = rng.choice([n for n in tensors if n.endswith("norm.weight")])
    entry, data = tensors[name]
    tensors[name] = (entry, data[2:] + data[:2])
    (folder / SINGLE).write_bytes(pack(tensors))


def tokenizer(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, random.Random], None]:
    return lambda folder, rng: edit_json(folder / "tokenizer.json", change)


def add_token(document: dict[str, Any]) -> None:
    size = 1 + max(token["id"] for token in document["added_tokens"])
    document["added_tokens"].append({**document["added_tokens"][-1], "id": size, "content": "<x>"})


def permit(folder: Path, rng: random.Random) -> None:
    for path in folder.iterdir():
        path.chmod(0o444)
        os.utime(path, (rng.randrange(10**9), rng.randrange(10**9)))
