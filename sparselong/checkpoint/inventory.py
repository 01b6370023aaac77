"""Which files of a directory are the checkpoint: one answer for every stage. No torch.

A checkpoint is config.json, its weights (the files that model.safetensors.index.json names, or one
model.safetensors) and side files with known names: tokenizer, chat template, generation config,
licence. Only these are read, copied, linked and recorded. Other files, such as original/, *.bin,
notes or dead links, are never touched.

transformers decides for itself which files it reads. A directory in which its decision could differ
is refused: a model.safetensors beside an index (it ignores the index), tensors in a shard that the
index does not name (it loads them), config.json's transformers_weights (it loads that file), and
adapter_config.json (it puts that adapter on the model).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparselong.checkpoint.header import TensorRecord, damaged, read_header
from sparselong.errors import StageError
from sparselong.files import read_json
from sparselong.provenance import refuse_changes

METHOD = "sparselong"
"""quant_method of packed checkpoints in config.json."""
CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
TOKENIZER = "tokenizer.json"
_ADAPTER = "adapter_config.json"
_NEEDED = (
    *("generation_config.json", TOKENIZER, "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "tiktoken.model"),
)
_DOCUMENTS = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USAGE_POLICY")
_VERSIONED_TOKENIZER = re.compile(r"tokenizer\.\d+(\.\d+)*\.json")
_TEMPLATES = "additional_chat_templates"
_SHARD = re.compile(r"model-.*\.safetensors")
DOWNLOADED = (
    *(CONFIG, INDEX, "model*.safetensors", *_NEEDED, *_DOCUMENTS),
    *("tokenizer.*.json", f"{_TEMPLATES}/*.jinja"),
)
"""Patterns of what is downloaded from the hub: the files that are the checkpoint, and no others."""
STALE = re.compile(r"\.self_attn\.[qkvo]_proj\.weight$")
"""Names that a packed checkpoint's linked shards may hold in addition to the index's."""


@dataclass(frozen=True)
class Inventory:
    """The files of a checkpoint.

    Attributes:
        directory: where they are.
        config: content of config.json.
        tensors: location of each tensor by name.
        side_files: sorted names of the other files, without config.json and index.
        has_index: whether an index names the weights.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorRecord]
    side_files: tuple[str, ...]
    has_index: bool

    @property
    def files(self) -> list[str]:
        """Sorted names of the weight files."""
        return sorted({record.file for record in self.tensors.values()})

    @property
    def names(self) -> list[str]:
        """Names of all files, config.json first."""
        return [CONFIG, *([INDEX] if self.has_index else []), *self.files, *self.side_files]

    @property
    def paths(self) -> list[Path]:
        """Paths of all files, config.json first."""
        return [self.directory / name for name in self.names]


def take_inventory(directory: Path) -> Inventory:
    """Return the files that are the checkpoint in a directory, with all headers read.

    Raises:
        StageError: a file is missing or damaged, or it is ambiguous which files are the checkpoint.
    """
    try:
        present = set(os.listdir(directory))
    except OSError as error:
        raise damaged(
            directory, error.strerror or str(error), "a directory", "correct the path"
        ) from error
    if _ADAPTER in present:
        raise StageError(
            f"{directory} contains an adapter beside the model",
            f"a checkpoint without {_ADAPTER}: transformers would put the adapter on the model",
            f"{directory / _ADAPTER}",
            "move the adapter's files elsewhere, or merge the adapter into the weights first",
        )
    config = read_json(directory / CONFIG)
    if config.get("transformers_weights") is not None:
        raise StageError(
            f"{directory / CONFIG} names its own weight file",
            f"no transformers_weights: the weights are those of {INDEX}, or {SINGLE}",
            f"transformers_weights: {config['transformers_weights']!r}",
            "remove this key, or give the file the usual name",
        )
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise StageError(
            f"{directory / CONFIG} does not say how the weights are stored",
            "quantization_config: an object with quant_method",
            f"quantization_config: {quantization!r}",
            "download config.json again",
        )
    has_index = os.path.isfile(directory / INDEX)
    has_single = os.path.isfile(directory / SINGLE)
    if not has_index and not has_single:
        raise _no_weights(directory, present)
    if has_index:
        weight_map = _read_weight_map(directory)
    else:
        weight_map = dict.fromkeys(read_header(directory / SINGLE), SINGLE)
    named = set(weight_map.values()) or {SINGLE}
    _refuse_strays(directory, present, named, has_index, has_single)
    tensors = _locate(directory, weight_map, quantization.get("quant_method") == METHOD)
    return Inventory(directory, config, tensors, _side_files(directory, present), has_index)


def missing_files(directory: Path) -> list[str]:
    """Return names of weights, config.json and tokenizer that a checkpoint's directory lacks.

    A snapshot in the hub cache may be incomplete. What a damaged index names cannot be missed:
    opening the checkpoint explains it.
    """
    names = [CONFIG, TOKENIZER, SINGLE]
    if os.path.isfile(directory / INDEX):
        try:
            names[2:] = sorted(set(_read_weight_map(directory).values()))
        except StageError:
            names[2:] = []
    return [name for name in names if not os.path.isfile(directory / name)]


def check_recorded(
    inventory: Inventory, rows: Iterable[Mapping[str, Any]], stage: str, is_whole: bool = True
) -> None:
    """Raise unless a checkpoint consists of the files that a stage recorded.

    Args:
        inventory: the checkpoint as it is now; its directory may have been moved.
        rows: rows of `describe_files`. Those beside the recorded config.json are the checkpoint's.
        stage: the stage that recorded them.
        is_whole: whether it recorded all of them; if not, others are allowed.

    Raises:
        StageError: a file was changed, removed or added since.
    """
    rows = list(rows)
    folder = next((Path(r["path"]).parent for r in rows if Path(r["path"]).name == CONFIG), None)
    recorded = {
        str(Path(row["path"]).relative_to(folder)): row
        for row in rows
        if folder is not None and Path(row["path"]).is_relative_to(folder)
    }
    moved = [{**row, "path": name} for name, row in recorded.items()]
    refuse_changes(moved, inventory.directory, stage)
    added = sorted(set(inventory.names) - set(recorded))
    if (
        is_whole and added and all("mtime_ns" in row for row in moved)
    ):  # older manifests list fewer files
        raise StageError(
            f"{inventory.directory / added[0]} is new: {stage} did not record it",
            f"the {len(recorded)} files of the checkpoint that {stage} recorded",
            f"{len(added)} more",
            f"remove the file, or redo the stages from {stage} on: python {stage}.py --force",
        )


def _no_weights(directory: Path, present: set[str]) -> StageError:
    shards = sorted(name for name in present if _SHARD.fullmatch(name))
    if shards:
        return StageError(
            f"the index of {directory} is missing",
            f"{INDEX}, which names the shards",
            f"{len(shards)} shards without it, such as {shards[0]}",
            "download the index again",
        )
    others = sorted(n for n in present if n.endswith((".safetensors", ".bin", ".gguf", ".pth")))
    found = f"other files: {', '.join(others[:4])}" if others else "neither"
    return damaged(directory, found, f"{INDEX} with its shards, or {SINGLE}", "set model.base")


def _read_weight_map(directory: Path) -> dict[str, str]:
    """Return the index's map from tensor names to files of this directory."""
    path = directory / INDEX
    weight_map = read_json(path).get("weight_map")
    entries = weight_map.items() if isinstance(weight_map, dict) else ()
    odd = [f"{file!r} for {name}" for name, file in entries if not isinstance(file, str)]
    if not isinstance(weight_map, dict) or not weight_map or odd:
        kind = "empty" if weight_map == {} else type(weight_map).__name__
        raise StageError(
            f"{path} is not an index",
            "weight_map: an object of tensor names and file names",
            f"weight_map: {odd[0] if odd else kind}",
            "download the index again",
        )
    for name, file in weight_map.items():
        if os.path.basename(file) != file or not file.endswith(".safetensors") or "\0" in file:
            raise StageError(
                f"{path} names a file that is not a shard of this directory",
                f"names of safetensors files in {directory}",
                f"{file!r} for {name}",
                "download the index again",
            )
    return weight_map


def _refuse_strays(
    directory: Path, present: set[str], named: set[str], has_index: bool, has_single: bool
) -> None:
    """Raise if the directory holds more than one set of weights."""
    strays = sorted(
        name
        for name in present - named
        if _SHARD.fullmatch(name) and os.path.isfile(directory / name)
    )
    if has_index and has_single and named != {SINGLE}:
        found = f"both, and transformers would read {SINGLE}"
    elif strays and not has_index:
        found = f"both: {len(strays)} shards, such as {strays[0]}, and no index"
    elif strays:
        raise StageError(
            f"{directory / INDEX} does not name {', '.join(strays)}",
            "every shard in the index",
            f"{len(strays)} shards with no indexed tensor",
            "download the index again, or remove files that do not belong here",
        )
    else:
        return
    raise StageError(
        f"{directory} holds two sets of weights",
        f"{INDEX} with its shards, or {SINGLE}, but not both",
        found,
        f"remove the one that does not belong here: {SINGLE}, or {INDEX} and its shards",
    )


def _locate(directory: Path, weight_map: dict[str, str], packed: bool) -> dict[str, TensorRecord]:
    """Return each tensor's record; raise if index and shards disagree."""
    tensors: dict[str, TensorRecord] = {}
    for file in sorted(set(weight_map.values())):
        if not os.path.isfile(directory / file):
            raise StageError(
                f"shard {directory / file} is missing",
                f"every file named in {INDEX}",
                f"{sum(f == file for f in weight_map.values())} tensors are indexed in it",
                "download this file again",
            )
        header = read_header(directory / file)
        for name in header:
            if weight_map.get(name) == file or (
                packed and name not in weight_map and STALE.search(name)
            ):
                continue
            other = weight_map.get(name)
            raise StageError(
                f"tensor {name} of {directory / file} is not in the index",
                f"every tensor of a shard in {INDEX}, in that shard",
                f"the index puts it in {other}: it is there twice" if other else "no such name",
                "download the shard and the index again",
            )
        for name, wanted in weight_map.items():
            if wanted == file and name not in header:
                raise StageError(
                    f"tensor {name} is missing",
                    f"in {directory / file}, according to the index",
                    "not in that file",
                    "download the shard and the index again",
                )
        tensors |= {name: record for name, record in header.items() if name in weight_map}
    return tensors


def _side_files(directory: Path, present: set[str]) -> tuple[str, ...]:
    """Return the names of the side files; links that lead nowhere count as absent."""
    names = {name for name in _NEEDED if name in present}
    names |= {name for name in present if _VERSIONED_TOKENIZER.fullmatch(name)}
    if _TEMPLATES in present and os.path.isdir(directory / _TEMPLATES):
        templates = os.listdir(directory / _TEMPLATES)
        names |= {f"{_TEMPLATES}/{name}" for name in templates if name.endswith(".jinja")}
    found = sorted(name for name in names if os.path.isfile(directory / name))
    for name in found:
        if not os.access(directory / name, os.R_OK):
            raise damaged(directory / name, "Permission denied", "a file that this user can read")
    documents = [
        name
        for name in _DOCUMENTS
        if name in present
        and os.path.isfile(directory / name)
        and os.access(directory / name, os.R_OK)
    ]
    return tuple(found + documents)
