"""Models of other runs, and other checkpoints, that are measured beside the run's own. No torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from sparselong.checkpoint import METHOD, TOKENIZER, Inventory, check_recorded, take_inventory
from sparselong.config import Config
from sparselong.errors import ConfigError, StageError
from sparselong.files import read_json, why_unusable
from sparselong.provenance import describe_files
from sparselong.run import MANIFEST, read_manifest

_MODELS = ("03_finetune", "02_compress")
"""Stages whose model stands for a run, the last one first."""
_SIZES = (
    *("vocab_size", "num_hidden_layers", "hidden_size", "intermediate_size"),
    *("num_experts_per_tok", "num_attention_heads", "num_key_value_heads"),
)
_EXPERTS = "num_local_experts"
_KEY, _OPTION = "evaluation.compare", "--compare"
_OWN = ("base", "compressed", "finetuned")
"""Names of the run's own models in results."""


class Compared(NamedTuple):
    """A model that is compared with the base.

    Attributes:
        label: as the user wrote it, for the report; `./base` for a folder named like an own model.
        name: for files.
        directory: its checkpoint.
        fingerprint: of its files' names, sizes and times.
        recorded: rows of `describe_files` with absolute paths, if a run's stage recorded its files.
    """

    label: str
    name: str
    directory: Path
    fingerprint: str
    recorded: tuple[dict[str, Any], ...] = ()


def find_compared(config: Config) -> list[Compared]:
    """Return the models that `evaluation.compare` names.

    Raises:
        ConfigError: one is no finished run and no checkpoint that can be opened, or is named twice.
        StageError: files of a checkpoint are missing or damaged, or a run's model is not what its
            stage recorded.
    """
    found: list[Compared] = []
    for label in config.evaluation.compare:
        label = f"./{label}" if label in _OWN else label
        run, stage = Path(label), _find_stage(Path(label))
        directory = (run / stage / "model" if stage else run).resolve()
        if directory in [each.directory for each in found]:
            raise ConfigError(
                f"{_KEY} names a model twice",
                "each model once",
                f"{label}: {directory}",
                f"leave it out of {_OPTION}",
            )
        inventory = take_inventory(directory)
        _check_kind(label, inventory)
        mark = hashlib.sha256(str(directory).encode()).hexdigest()[:8]
        rows = _check_recorded(run, stage, inventory) if stage else ()
        found.append(Compared(label, f"compared-{mark}", directory, _fingerprint(inventory), rows))
    return found


def describe_compared(compared: list[Compared], run_dir: Path) -> dict[str, Any]:
    """Return by label each model's directory and rows of `describe_files`, with their hashes."""
    return {
        each.label: {
            "directory": str(each.directory),
            "files": describe_files([each.directory], run_dir, each.recorded),
        }
        for each in compared
    }


def check_sizes(compared: list[Compared], base: Path, processes: int) -> None:
    """Raise unless the models have the base's sizes and tokens, and no more experts than the base.

    Args:
        compared: the models.
        base: the base's directory.
        processes: the most processes that may share a model's experts.

    Raises:
        ConfigError: names the model and what differs.
    """
    wanted, vocabulary = read_json(base / "config.json"), _vocabulary(base)
    for each in compared:
        sizes = read_json(each.directory / "config.json")
        differing = [key for key in _SIZES if sizes.get(key) != wanted.get(key)]
        if differing or _vocabulary(each.directory) != vocabulary:
            raise ConfigError(
                f"{each.label} of {_KEY} cannot be compared with the base",
                ", ".join(f"{key} {wanted.get(key)}" for key in differing) or "the base's tokens",
                ", ".join(f"{key} {sizes.get(key)}" for key in differing) or "other tokens",
                f"leave it out of {_OPTION}",
            )
        _check_experts(each.label, sizes.get(_EXPERTS), wanted.get(_EXPERTS), processes)


def _check_experts(label: str, found: Any, base: Any, processes: int) -> None:
    """Raise unless a model's experts, as many as the base's or fewer, can be shared as those are.

    How many processes share them is decided by the base: a divisor of its number of experts.
    """
    if found == base:
        return
    if type(found) is not int or type(base) is not int or found > base:
        raise ConfigError(
            f"{label} of {_KEY} cannot be compared with the base",
            f"at most the base's {base} experts ({_EXPERTS})",
            f"{_EXPERTS} {found}",
            f"leave it out of {_OPTION}",
        )
    shared = math.gcd(processes, base)
    if found % shared:
        raise ConfigError(
            f"{label} of {_KEY} cannot be measured by {processes} processes",
            f"a number of experts that {shared} processes can share, as they may share the base's",
            f"{_EXPERTS} {found}",
            f"use fewer processes, expert_parallel_degree=1, or leave it out of {_OPTION}",
        )


def _find_stage(path: Path) -> str | None:
    """Return the stage whose model stands for a run; None if the path is a checkpoint's."""
    for stage in _MODELS:
        if (path / stage / MANIFEST).is_file():
            return stage
    if (path / "config.json").is_file():
        return None
    raise ConfigError(
        f"{_KEY} names {path}, which is no model",
        f"a run with {' or '.join(_MODELS)} finished, or a directory with a checkpoint",
        "a directory without either" if path.is_dir() else why_unusable(path, "directory"),
        f"correct the path, or leave it out of {_OPTION}",
    )


def _check_recorded(run: Path, stage: str, inventory: Inventory) -> tuple[dict[str, Any], ...]:
    """Return what a run's stage recorded of its model; raise if that has changed since."""
    manifest = read_manifest(run, stage)
    rows = manifest["outputs"] if manifest is not None else []
    try:
        check_recorded(inventory, rows, stage)
    except StageError as error:
        redo = f"python {stage}.py --run-dir {shlex.quote(str(run))} --force"
        raise error.with_fix(f"restore it, or redo it there: {redo}") from None
    return tuple({**row, "path": str((run / row["path"]).absolute())} for row in rows)


def _check_kind(label: str, inventory: Inventory) -> None:
    kind = inventory.config.get("model_type")
    method = (inventory.config.get("quantization_config") or {}).get("quant_method")
    if kind != "gpt_oss" or method not in ("mxfp4", METHOD):
        raise ConfigError(
            f"{label} of {_KEY} cannot be opened",
            f"a gpt-oss checkpoint with mxfp4 or {METHOD} weights",
            f"model_type {kind}, quantization {method}",
            f"export it with 05_export.py --to mxfp4, or leave it out of {_OPTION}",
        )


def _fingerprint(inventory: Inventory) -> str:
    stats = [(name, os.stat(inventory.directory / name)) for name in sorted(inventory.names)]
    told = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _vocabulary(directory: Path) -> tuple[Any, Any]:
    document = read_json(directory / TOKENIZER)
    added = [(each["id"], each["content"]) for each in document.get("added_tokens", [])]
    return document["model"]["vocab"], sorted(added)
