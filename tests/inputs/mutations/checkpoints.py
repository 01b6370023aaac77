"""Mutations of a valid checkpoint folder, and what each must lead to.

`same`: accepted, with the reference's tensors and architecture. `means`: accepted, with what an
independent reader finds in the changed folder. `refused`: explained. `either`: accepted as the
independent reader finds it, or explained.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.inputs.mutations import edits
from tests.inputs.mutations.folder import (
    INDEX,
    edit_header,
    edit_json,
    pack,
    rewrite,
    shards,
)

Expected = Literal["same", "means", "refused", "either"]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 1234\n" % (b"a" * 64)


@dataclass(frozen=True)
class Mutation:
    """A change of a folder: its name, what must follow, and the change itself."""

    name: str
    expected: Expected
    change: Callable[[Path, random.Random], None]


SAME = {
    "config-keys-shuffled": lambda f, r: edit_json(
        f / "config.json", lambda d: edits.shuffled(d, r)
    ),
    "index-shuffled": lambda f, r: edit_json(
        f / INDEX, lambda d: {"weight_map": edits.shuffled(d["weight_map"], r)}
    ),
    "header-padded": edits.pad_header,
    "header-shuffled": edits.reorder_header,
    "single-file": edits.merge,
    "sharded-otherwise": edits.reshard,
    "hub-snapshot": edits.as_snapshot,
    "read-only": edits.permit,
    "no-generation-config": edits.delete("generation_config.json"),
    "no-tiny-json": edits.delete("tiny.json"),
    "readme-added": edits.add("README.md", b"# A model\n"),
    "notes-added": edits.add("notes.txt", b"\xff\xfe not text"),
    "optimizer-added": edits.add("training_args.bin", b"\x80"),
    "original-added": edits.add("original/model.safetensors", b"not opened"),
    "unneeded-dead-link": lambda f, r: (f / "USAGE_POLICY").symlink_to("../blobs/gone"),
    "unneeded-dead-json": lambda f, r: (f / "extra.json").symlink_to("../blobs/gone"),
    "config-comment-key": edits.set_key("_comment", "made by hand"),
    "header-metadata": lambda f, r: edit_header(
        r.choice(shards(f)), lambda h: h.__setitem__("__metadata__", {"made": "by hand"})
    ),
}
MEANS = {
    "norm-changed": edits.change_bytes(("norm.weight",), b"\x11\x22\x33\x3f"),
    "blocks-changed": edits.change_bytes(("_blocks",), bytes(range(256))),
    "scales-changed": edits.change_bytes(("_scales",), bytes(range(110, 130))),
    "eps": edits.set_key("rms_norm_eps", 1e-6),
    "window": edits.set_key("sliding_window", 32),
    "top-k": edits.set_key("num_experts_per_tok", 2),
    "theta": edits.set_key("rope_parameters.rope_theta", 10000.0),
}
REFUSED = {
    "shard-cut": edits.cut("model-*.safetensors"),
    "shard-empty": edits.replace("model-*.safetensors", b""),
    "shard-pointer": edits.replace("model-*.safetensors", POINTER),
    "shard-missing": edits.delete("model-*.safetensors"),
    "shard-dead-link": edits.dead("model-*.safetensors"),
    "shards-swapped": edits.swap,
    "shard-extra": edits.add("model-00009-of-00009.safetensors", pack({})),
    "index-entry-dropped": edits.index(edits.drop_entry),
    "index-entry-redirected": edits.index(edits.redirect_entry),
    "index-entry-nowhere": edits.point_to("model-00007-of-00007.safetensors"),
    "index-entry-outside": edits.point_to("../model-00001-of-00004.safetensors"),
    "index-entry-number": edits.point_to(3),
    "index-entry-empty": edits.point_to(""),
    "index-entry-repeated": edits.repeat_key(
        INDEX, "lm_head.weight", "model-00002-of-00004.safetensors"
    ),
    "index-cut": edits.cut(INDEX),
    "index-list": edits.replace(INDEX, b"[]"),
    "index-pointer": edits.replace(INDEX, POINTER),
    "header-length": edits.length,
    "header-entry-repeated": edits.repeat_header_entry,
    "header-offsets": edits.entry(edits.shift),
    "header-shape": edits.entry(edits.reshape),
    "header-dtype": edits.entry(edits.retype),
    "tensor-renamed": edits.rename,
    "tensor-removed": edits.remove_tensor,
    "norm-nan": edits.change_bytes(("norm.weight",), b"\xc0\x7f", 2),
    "norm-infinite": edits.change_bytes(("norm.weight",), b"\x80\x7f", 2),
    "scale-nan": edits.change_bytes(("_scales",), b"\xff"),
    "stale-single": edits.stale_single,
    "adapter": edits.add(
        "adapter_config.json", b'{"peft_type": "LORA", "base_model_name_or_path": "x"}'
    ),
    "config-missing": edits.delete("config.json"),
    "config-cut": edits.cut("config.json"),
    "config-empty": edits.replace("config.json", b""),
    "config-list": edits.replace("config.json", b"[]"),
    "config-pointer": edits.replace("config.json", POINTER),
    "config-repeated": edits.repeat_key("config.json", "num_hidden_layers", 2),
    "config-dead-link": edits.dead("config.json"),
    "not-quantized": edits.remove("quantization_config"),
    "other-method": edits.set_key("quantization_config.quant_method", "fp8"),
    "other-model": edits.set_key("model_type", "mixtral"),
    "tokenizer-missing": edits.delete("tokenizer.json"),
    "tokenizer-cut": edits.cut("tokenizer.json"),
    "tokenizer-pointer": edits.replace("tokenizer.json", POINTER),
    "tokenizer-no-merges": edits.tokenizer(lambda d: d["model"].__setitem__("merges", [])),
    "tokenizer-token-added": edits.tokenizer(edits.add_token),
    "template-missing": edits.delete("chat_template.jinja"),
    "template-broken": edits.replace("chat_template.jinja", b"{% for m in messages %}"),
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
    f"{key}={json.dumps(value)}": edits.set_key(key, value)
    for key, values in _SIZES.items()
    for value in values
}
REFUSED |= {
    f"no-{key}": edits.remove(key)
    for key in (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "num_local_experts", "num_experts_per_tok", "vocab_size"),
        *("model_type", "sliding_window", "rope_parameters"),
    )
}
EITHER = {
    "header-byte": edits.flip_header_byte,
    "config-byte": edits.flip_json_byte("config.json"),
    "index-byte": edits.flip_json_byte(INDEX),
    "tokenizer-byte": edits.flip_json_byte("tokenizer.json"),
    "template-byte": edits.flip_json_byte("chat_template.jinja"),
    "no-architectures": edits.remove("architectures"),
    "no-layer-types": edits.remove("layer_types"),
    "layer-types-null": edits.set_key("layer_types", None),
    "no-eps": edits.remove("rms_norm_eps"),
    "no-head-dim": edits.remove("head_dim"),
    "no-eos": edits.remove("eos_token_id"),
    "no-tokenizer-config": edits.delete("tokenizer_config.json"),
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
