"""Mutations of a valid checkpoint folder, and what each must lead to.

`same`: accepted, with the reference's tensors and architecture. `means`: accepted, with what an
independent reader finds in the changed folder. `refused`: explained. `either`: accepted as the
independent reader finds it, or explained.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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

Expected = Literal["same", "means", "refused", "either"]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 1234\n" % (b"a" * 64)


@dataclass(frozen=True)
class Mutation:
    """A change of a folder: its name, what must follow, and the change itself."""

    name: str
    expected: Expected
    change: Callable[[Path, random.Random], None]


def _config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, random.Random], None]:
    return lambda folder, rng: edit_json(folder / "config.json", change)


def _set(key: str, value: Any) -> Callable[[Path, random.Random], None]:
    def change(document: dict[str, Any]) -> None:
        *parents, last = key.split(".")
        for parent in parents:
            document = document[parent]
        document[last] = value

    return _config(change)


def _remove(key: str) -> Callable[[Path, random.Random], None]:
    def change(document: dict[str, Any]) -> None:
        *parents, last = key.split(".")
        for parent in parents:
            document = document[parent]
        del document[last]

    return _config(change)


def _shuffled(document: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    items = list(document.items())
    rng.shuffle(items)
    return dict(items)


def _tensor_of(folder: Path, rng: random.Random, ends: tuple[str, ...]) -> tuple[Path, str]:
    found = [(p, n) for p in shards(folder) for n in split(p)[0] if n.endswith(ends)]
    return rng.choice(sorted(found))


def _change_bytes(ends: tuple[str, ...], values: bytes, width: int = 1):
    """Overwrite one element of a tensor whose name ends so."""

    def change(folder: Path, rng: random.Random) -> None:
        path, name = _tensor_of(folder, rng, ends)
        header, data = split(path)
        begin, end = header[name]["data_offsets"]
        place = begin + rng.randrange((end - begin) // width) * width
        new = bytes(rng.choice(values) for _ in range(width)) if width == 1 else values
        if data[place : place + width] == new:
            new = bytes([new[0] ^ 1]) + new[1:]
        rewrite(path, join(header, data[:place] + new + data[place + width :]))

    return change


def _merge(folder: Path, rng: random.Random) -> None:
    everything = pack(_shuffled(collect(folder), rng))
    for path in [*shards(folder), folder / INDEX]:
        path.unlink()
    (folder / SINGLE).write_bytes(everything)


def _reshard(folder: Path, rng: random.Random) -> None:
    tensors, count = _shuffled(collect(folder), rng), rng.randint(1, 6)
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


def _reorder_header(folder: Path, rng: random.Random) -> None:
    edit_header(rng.choice(shards(folder)), lambda header: _shuffled(header, rng))


def _pad_header(folder: Path, rng: random.Random) -> None:
    path = rng.choice(shards(folder))
    header, data = split(path)
    rewrite(path, join(json.dumps(header) + " " * 8 * rng.randint(1, 9), data))


def _as_snapshot(folder: Path, rng: random.Random) -> None:
    blobs = folder.parent / f"{folder.name}-blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(p for p in folder.iterdir() if p.is_file())):
        path.rename(blobs / f"{number:064d}")
        path.symlink_to(Path("..") / blobs.name / f"{number:064d}")


def _add(name: str, content: bytes) -> Callable[[Path, random.Random], None]:
    def change(folder: Path, rng: random.Random) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        rewrite(folder / name, content)

    return change


def _cut(pattern: str) -> Callable[[Path, random.Random], None]:
    def change(folder: Path, rng: random.Random) -> None:
        path = rng.choice(sorted(folder.glob(pattern)))
        data = path.read_bytes()
        rewrite(path, data[: rng.randrange(len(data))])

    return change


def _replace(pattern: str, content: bytes) -> Callable[[Path, random.Random], None]:
    return lambda folder, rng: rewrite(rng.choice(sorted(folder.glob(pattern))), content)


def _delete(pattern: str) -> Callable[[Path, random.Random], None]:
    return lambda folder, rng: rng.choice(sorted(folder.glob(pattern))).unlink()


def _swap(folder: Path, rng: random.Random) -> None:
    one, other = rng.sample(shards(folder), 2)
    first, second = one.read_bytes(), other.read_bytes()
    rewrite(one, second)
    rewrite(other, first)


def _dead(pattern: str) -> Callable[[Path, random.Random], None]:
    def change(folder: Path, rng: random.Random) -> None:
        path = rng.choice(sorted(folder.glob(pattern)))
        path.unlink()
        path.symlink_to("../blobs/gone")

    return change


def _index(change: Callable[[dict[str, str], random.Random], Any]):
    def apply(folder: Path, rng: random.Random) -> None:
        edit_json(folder / INDEX, lambda document: change(document["weight_map"], rng))

    return apply


def _drop_entry(weight_map: dict[str, str], rng: random.Random) -> None:
    del weight_map[rng.choice(sorted(weight_map))]


def _redirect_entry(weight_map: dict[str, str], rng: random.Random) -> None:
    name = rng.choice(sorted(weight_map))
    weight_map[name] = rng.choice(sorted(set(weight_map.values()) - {weight_map[name]}))


def _point_to(target: Any):
    def change(weight_map: dict[str, str], rng: random.Random) -> None:
        weight_map[rng.choice(sorted(weight_map))] = target

    return _index(change)


def _repeat_key(file: str, key: str, value: Any) -> Callable[[Path, random.Random], None]:
    """Write a key a second time, with another value, at the start of a JSON object's text."""

    def change(folder: Path, rng: random.Random) -> None:
        text = (folder / file).read_text()
        at = text.index("{", text.index("weight_map")) if file == INDEX else text.index("{")
        added = f"{json.dumps(key)}: {json.dumps(value)}, "
        rewrite(folder / file, (text[: at + 1] + added + text[at + 1 :]).encode())

    return change


def _repeat_header_entry(folder: Path, rng: random.Random) -> None:
    path = rng.choice(shards(folder))
    header, data = split(path)
    name = rng.choice(sorted(set(header) - {"__metadata__"}))
    entry = {**header[name], "data_offsets": [0, 0], "shape": [0]}
    text = f"{{{json.dumps(name)}: {json.dumps(entry)}, {json.dumps(header)[1:]}"
    rewrite(path, join(text, data))


def _entry(change: Callable[[dict[str, Any], random.Random], None]):
    def apply(folder: Path, rng: random.Random) -> None:
        def edit(header: dict[str, Any]) -> None:
            change(header[rng.choice(sorted(set(header) - {"__metadata__"}))], rng)

        edit_header(rng.choice(shards(folder)), edit)

    return apply


def _shift(entry: dict[str, Any], rng: random.Random) -> None:
    by = rng.choice((-2, 2, 64, -(1 << 40), 1 << 40))
    entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]


def _reshape(entry: dict[str, Any], rng: random.Random) -> None:
    entry["shape"] = rng.choice(([*entry["shape"], 2], [1, 1, *entry["shape"]], [-1], "8", [0.5]))


def _retype(entry: dict[str, Any], rng: random.Random) -> None:
    entry["dtype"] = rng.choice(("F32", "F16" if entry["dtype"] == "BF16" else "I8", "X", 7, None))


def _rename(folder: Path, rng: random.Random) -> None:
    path, name = _tensor_of(folder, rng, ("weight", "bias"))
    new = name.replace("model", "modell") if "model" in name else f"{name}_"

    def edit(header: dict[str, Any]) -> dict[str, Any]:
        return {(new if key == name else key): value for key, value in header.items()}

    edit_header(path, edit)
    edit_json(folder / INDEX, lambda d: d["weight_map"].update({new: d["weight_map"].pop(name)}))


def _remove_tensor(folder: Path, rng: random.Random) -> None:
    path, name = _tensor_of(folder, rng, ("weight", "bias", "blocks", "scales", "sinks"))
    edit_header(path, lambda header: {k: v for k, v in header.items() if k != name})
    edit_json(folder / INDEX, lambda d: d["weight_map"].pop(name) and None)


def _length(folder: Path, rng: random.Random) -> None:
    path = rng.choice(shards(folder))
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    new = rng.choice((0, 1, length - 1, length + 1, 1 << 62, (1 << 64) - 1))
    rewrite(path, struct.pack("<Q", new) + raw[8:])


def _flip_header_byte(folder: Path, rng: random.Random) -> None:
    path = rng.choice(shards(folder))
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", bytes(raw[:8]))
    raw[8 + rng.randrange(length)] ^= 1 << rng.randrange(7)
    rewrite(path, bytes(raw))


def _flip_json_byte(file: str) -> Callable[[Path, random.Random], None]:
    def change(folder: Path, rng: random.Random) -> None:
        raw = bytearray((folder / file).read_bytes())
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(7)
        rewrite(folder / file, bytes(raw))

    return change


def _stale_single(folder: Path, rng: random.Random) -> None:
    tensors = dict(collect(folder))
    name = rng.choice([n for n in tensors if n.endswith("norm.weight")])
    entry, data = tensors[name]
    tensors[name] = (entry, data[2:] + data[:2])
    (folder / SINGLE).write_bytes(pack(tensors))


def _tokenizer(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, random.Random], None]:
    return lambda folder, rng: edit_json(folder / "tokenizer.json", change)


def _add_token(document: dict[str, Any]) -> None:
    size = 1 + max(token["id"] for token in document["added_tokens"])
    document["added_tokens"].append({**document["added_tokens"][-1], "id": size, "content": "<x>"})


def _permit(folder: Path, rng: random.Random) -> None:
    for path in folder.iterdir():
        path.chmod(0o444)
        os.utime(path, (rng.randrange(10**9), rng.randrange(10**9)))


SAME = {
    "config-keys-shuffled": lambda f, r: edit_json(f / "config.json", lambda d: _shuffled(d, r)),
    "index-shuffled": lambda f, r: edit_json(
        f / INDEX, lambda d: {"weight_map": _shuffled(d["weight_map"], r)}
    ),
    "header-padded": _pad_header,
    "header-shuffled": _reorder_header,
    "single-file": _merge,
    "sharded-otherwise": _reshard,
    "hub-snapshot": _as_snapshot,
    "read-only": _permit,
    "no-generation-config": _delete("generation_config.json"),
    "no-tiny-json": _delete("tiny.json"),
    "readme-added": _add("README.md", b"# A model\n"),
    "notes-added": _add("notes.txt", b"\xff\xfe not text"),
    "optimizer-added": _add("training_args.bin", b"\x80"),
    "original-added": _add("original/model.safetensors", b"not opened"),
    "unneeded-dead-link": lambda f, r: (f / "USAGE_POLICY").symlink_to("../blobs/gone"),
    "unneeded-dead-json": lambda f, r: (f / "extra.json").symlink_to("../blobs/gone"),
    "config-comment-key": _set("_comment", "made by hand"),
    "header-metadata": lambda f, r: edit_header(
        r.choice(shards(f)), lambda h: h.__setitem__("__metadata__", {"made": "by hand"})
    ),
}
MEANS = {
    "norm-changed": _change_bytes(("norm.weight",), b"\x11\x22\x33\x3f"),
    "blocks-changed": _change_bytes(("_blocks",), bytes(range(256))),
    "scales-changed": _change_bytes(("_scales",), bytes(range(110, 130))),
    "eps": _set("rms_norm_eps", 1e-6),
    "window": _set("sliding_window", 32),
    "top-k": _set("num_experts_per_tok", 2),
    "theta": _set("rope_parameters.rope_theta", 10000.0),
}
REFUSED = {
    "shard-cut": _cut("model-*.safetensors"),
    "shard-empty": _replace("model-*.safetensors", b""),
    "shard-pointer": _replace("model-*.safetensors", POINTER),
    "shard-missing": _delete("model-*.safetensors"),
    "shard-dead-link": _dead("model-*.safetensors"),
    "shards-swapped": _swap,
    "shard-extra": _add("model-00009-of-00009.safetensors", pack({})),
    "index-entry-dropped": _index(_drop_entry),
    "index-entry-redirected": _index(_redirect_entry),
    "index-entry-nowhere": _point_to("model-00007-of-00007.safetensors"),
    "index-entry-outside": _point_to("../model-00001-of-00004.safetensors"),
    "index-entry-number": _point_to(3),
    "index-entry-empty": _point_to(""),
    "index-entry-repeated": _repeat_key(
        INDEX, "lm_head.weight", "model-00002-of-00004.safetensors"
    ),
    "index-cut": _cut(INDEX),
    "index-list": _replace(INDEX, b"[]"),
    "index-pointer": _replace(INDEX, POINTER),
    "header-length": _length,
    "header-entry-repeated": _repeat_header_entry,
    "header-offsets": _entry(_shift),
    "header-shape": _entry(_reshape),
    "header-dtype": _entry(_retype),
    "tensor-renamed": _rename,
    "tensor-removed": _remove_tensor,
    "norm-nan": _change_bytes(("norm.weight",), b"\xc0\x7f", 2),
    "norm-infinite": _change_bytes(("norm.weight",), b"\x80\x7f", 2),
    "scale-nan": _change_bytes(("_scales",), b"\xff"),
    "stale-single": _stale_single,
    "adapter": _add(
        "adapter_config.json", b'{"peft_type": "LORA", "base_model_name_or_path": "x"}'
    ),
    "config-missing": _delete("config.json"),
    "config-cut": _cut("config.json"),
    "config-empty": _replace("config.json", b""),
    "config-list": _replace("config.json", b"[]"),
    "config-pointer": _replace("config.json", POINTER),
    "config-repeated": _repeat_key("config.json", "num_hidden_layers", 2),
    "config-dead-link": _dead("config.json"),
    "not-quantized": _remove("quantization_config"),
    "other-method": _set("quantization_config.quant_method", "fp8"),
    "other-model": _set("model_type", "mixtral"),
    "tokenizer-missing": _delete("tokenizer.json"),
    "tokenizer-cut": _cut("tokenizer.json"),
    "tokenizer-pointer": _replace("tokenizer.json", POINTER),
    "tokenizer-no-merges": _tokenizer(lambda d: d["model"].__setitem__("merges", [])),
    "tokenizer-token-added": _tokenizer(_add_token),
    "template-missing": _delete("chat_template.jinja"),
    "template-broken": _replace("chat_template.jinja", b"{% for m in messages %}"),
}
_SIZES = {
    "hidden_size": (64, 160, 0, -1, "128", 128.5, None, True),
    "intermediate_size": (64, 160, 0, None),
    "num_hidden_layers": (3, 5, 0, "4", None),
    "num_attention_heads": (2, 8, 3, 0, None),
    "num_key_value_heads": (1, 4, 3, 0, None),
    "num_local_experts": (4, 16, 0, None),
    "num_experts_per_tok": (9, 0, -1, "4", None),
    "head_dim": (32, 128, 0, None),
    "vocab_size": (2047, 2049, 0, None),
    "layer_types": (["full_attention"], [], ["full_attention"] * 5, ["other"] * 4, "full"),
    "num_experts": (4,),
    "sliding_window": (0, -1, "64"),
    "rms_norm_eps": (0.0, -1e-5, "small", None),
    "tie_word_embeddings": (True,),
    "hidden_act": ("relu", "gelu"),
    "rope_parameters": ({}, 7, {"rope_type": "yarn"}, {"rope_type": "other", "rope_theta": 1e4}),
}
REFUSED |= {
    f"{key}={json.dumps(value)}": _set(key, value)
    for key, values in _SIZES.items()
    for value in values
}
REFUSED |= {
    f"no-{key}": _remove(key)
    for key in (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "num_local_experts", "num_experts_per_tok", "vocab_size"),
        *("model_type", "sliding_window", "rope_parameters"),
    )
}
EITHER = {
    "header-byte": _flip_header_byte,
    "config-byte": _flip_json_byte("config.json"),
    "index-byte": _flip_json_byte(INDEX),
    "tokenizer-byte": _flip_json_byte("tokenizer.json"),
    "template-byte": _flip_json_byte("chat_template.jinja"),
    "no-architectures": _remove("architectures"),
    "no-layer-types": _remove("layer_types"),
    "layer-types-null": _set("layer_types", None),
    "no-eps": _remove("rms_norm_eps"),
    "no-head-dim": _remove("head_dim"),
    "no-eos": _remove("eos_token_id"),
    "no-tokenizer-config": _delete("tokenizer_config.json"),
    "bom": lambda f, r: rewrite(
        f / "config.json", b"\xef\xbb\xbf" + (f / "config.json").read_bytes()
    ),
}
_TIMES = {"same": 3, "means": 4, "refused": 1, "either": 8}


def all_mutations() -> list[Mutation]:
    """Return every mutation; a family with random places occurs several times."""
    groups: dict[Expected, dict[str, Any]] = {
        "same": SAME,
        "means": MEANS,
        "refused": REFUSED,
        "either": EITHER,
    }
    found = []
    for expected, group in groups.items():
        for name, change in group.items():
            fixed = "=" in name or name.startswith("no-")
            for number in range(1 if fixed else _TIMES[expected]):
                found.append(Mutation(f"{name}-{number}", expected, change))
    return found
