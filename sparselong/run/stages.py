"""The table of stages: which earlier stages each reads, and which config keys affect its result.

A stage's hash covers the config sections that it and the stages it reads depend on. Changing a
training key therefore leaves a compressed model valid; changing a compression key does not. Keys
that do not affect results (config.keys.Incidental) are left out of all hashes and may be changed
when resuming a run. 01's hash leaves them out too, although its memory plan depends on some: this
is harmless because 01 always runs again. Whether a stage is up to date depends only on what it
reads.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparselong.config import Config, hash_sections, leaves, pick_sections
from sparselong.errors import ConfigError, StageError
from sparselong.provenance import install_fix, missing_modules

_COMMAND = re.compile(r"python \d\d_[a-z]+\.py\b(?! --help)(?![^\n,;]*--(config|run-dir)\b)")


@dataclass(frozen=True)
class Declaration:
    """What a stage depends on.

    Attributes:
        reads: earlier stages whose results it opens; they must be done first.
        sections: top-level config keys that affect its result, besides those of what it reads.
        previews: whether its command line has `--preview`.
        sweeps: whether its command line has `--sweep`.
        extended_by: key of a list, set by `--compare`. A finished stage continues, and is not
            redone, if the list names more than the config in its manifest.
        repeats: whether it is done again on every call, finished or not.
        parts: whether it has several results, each in a directory of its own with a manifest.
        by_layers: whether its command line has `--layers`.
        extra: the extra of the package, in pyproject.toml, that its script needs.
        imports: modules of that extra, or of the package's, which it imports.
    """

    reads: tuple[str, ...]
    sections: tuple[str, ...]
    previews: bool = False
    sweeps: bool = False
    extended_by: str = ""
    repeats: bool = False
    parts: bool = False
    by_layers: bool = False
    extra: str = ""
    imports: tuple[str, ...] = ()


STAGES: dict[str, Declaration] = {
    "01_health": Declaration(
        (),
        tuple(Config.model_fields),
        repeats=True,
        imports=("datasets", "torch", "transformers"),
    ),
    "02_compress": Declaration(
        (),
        (
            *("seed", "model", "shared_dense", "experts", "calibration", "data"),
            *("flash_attention", "attention_backend", "deterministic"),
        ),
        by_layers=True,
        extra="compress",
        imports=("llmcompressor", "compressed_tensors", "datasets"),
    ),
    "03_finetune": Declaration(
        ("02_compress",),
        ("sequence_len", "micro_batch_size", "lora", "finetuning_modifiers", "training"),
        previews=True,
        sweeps=True,
        extra="train",
        imports=("axolotl", "datasets", "matplotlib"),
    ),
    "04_eval": Declaration(
        ("02_compress", "03_finetune"),
        ("evaluation",),
        extended_by="evaluation.compare",
        extra="eval",
        imports=("lm_eval", "datasets", "matplotlib"),
    ),
    "05_export": Declaration(
        ("02_compress", "03_finetune"), (), parts=True, extra="export", imports=("gguf",)
    ),
    "06_chat": Declaration((), (), extra="chat", imports=("fastapi", "uvicorn")),
}


def check_installed(name: str) -> None:
    """Raise unless the packages of a script's extra are installed; imports none of them.

    01_health has no extra. It needs what its checks import, and reports what else is missing.

    Raises:
        StageError: one of them cannot be found.
    """
    extra, missing = STAGES[name].extra, missing_modules(STAGES[name].imports)
    if missing:
        raise StageError(
            f"{name} needs packages{f' of the extra `{extra}`' * bool(extra)}",
            f"sparselong{f'[{extra}]' * bool(extra)} installed for {sys.executable}",
            f"no {', no '.join(missing)}",
            install_fix(extra),
        )


def add_own_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the options of the command line that only some stages have."""
    stage = STAGES[name]
    if stage.previews:
        text = "print N conversations (or one) with supervised tokens marked, touch nothing"
        parser.add_argument("--preview", metavar="N|FILE:LINE", help=text)
    if stage.sweeps:
        text = "run once for each combination of values, in runs/NAME-sweep; see sparselong/sweep"
        shape = "KEY=VALUE,VALUE"
        parser.add_argument("--sweep", nargs="+", action="extend", metavar=shape, help=text)
    if stage.extended_by:
        text = "also measure models of other runs, or other checkpoints (evaluation.compare)"
        parser.add_argument("--compare", nargs="+", action="extend", metavar="RUN|PATH", help=text)
    if stage.by_layers:
        text = "work on layers A up to, but not including, B alone; a later command continues"
        parser.add_argument("--layers", metavar="A:B", help=text)


def parse_layers(text: str | None, forced: bool) -> range | None:
    """Return the layers that `--layers A:B` names: A up to, but not including, B.

    Args:
        text: the option; None without it.
        forced: whether `--force` removes the layers that are finished.

    Raises:
        ConfigError: they are not two numbers, there are no layers between them, or `--force` would
            remove the layers before them.
    """
    if text is None:
        return None
    first, colon, end = text.partition(":")
    are_numbers = all(part.isascii() and part.isdecimal() for part in (first, end))
    if not colon or not are_numbers or int(first) >= int(end):
        raise ConfigError(
            "--layers does not name layers",
            "A:B, the layers from A up to but not including B, as in 0:12",
            f"--layers {text}",
            "leave it out to compress all layers, or begin with --layers 0:B",
        )
    if forced and int(first):
        raise ConfigError(
            "--force removes the layers before those of --layers",
            "--layers that begins at 0",
            f"--layers {text} --force",
            f"leave out --force to continue, or start over with --layers 0:{end} --force",
        )
    return range(int(first), int(end))


def deciding_sections(name: str, reads: tuple[str, ...] | None = None) -> set[str]:
    """Return the top-level keys that affect a stage's result, directly or through its inputs.

    Args:
        name: the stage.
        reads: the earlier stages that it reads; None: those of the table.
    """
    sections = set(STAGES[name].sections)
    for earlier in STAGES[name].reads if reads is None else reads:
        sections |= deciding_sections(earlier)
    return sections


def stage_hash(config: Config, name: str, reads: tuple[str, ...] | None = None) -> str:
    """Return the hash of the config keys that affect the stage's result."""
    return hash_sections(config, deciding_sections(name, reads))


def redo_command(name: str, part: str = "", options: Mapping[str, Any] | None = None) -> str:
    """Return the command that redoes a stage, or one part of it.

    Args:
        name: the stage.
        part: the part, if the stage has parts; without it their script refuses the command.
        options: of the part. `to`, which names parts beside this one, is left out.
    """
    chosen = {"to": part, **{k: v for k, v in (options or {}).items() if k != "to"}} if part else {}
    words = [
        word for key, value in chosen.items() for word in (f"--{key}", shlex.quote(str(value)))
    ]
    return " ".join(["python", f"{name}.py", *words, "--force"])


def complete_commands(text: str, words: Sequence[str]) -> str:
    """Return a text in which commands of the scripts have the given words, like `--config FILE`.

    Messages are written where nobody knows the command line; without its config and overrides
    another run would be redone. A command that names a config or a run directory is left alone.
    """
    return (
        _COMMAND.sub(lambda found: " ".join([found[0], shlex.join(words)]), text) if words else text
    )


def name_changes(
    config: Config, name: str, before: dict[str, Any], reads: tuple[str, ...] | None = None
) -> tuple[str, str]:
    """Return, as overrides, the values that differ: those of now, and those of earlier work.

    Args:
        config: the config of now.
        name: the stage.
        before: the earlier work's manifest.json or started.json. Older ones hold only the config's
            hash: then both hashes are returned.
        reads: the earlier stages that it reads; None: those of the table.
    """
    now = dict(leaves(pick_sections(config, deciding_sections(name, reads))))
    recorded = before.get("config")
    then = dict(leaves(recorded)) if isinstance(recorded, dict) else now
    changed = [key for key in now if then.get(key) != now[key]]
    if not changed:  # not recorded, or another version's keys
        return f"config hash {stage_hash(config, name, reads)}", str(before["config_hash"])
    return _as_overrides(changed, now), _as_overrides(changed, then)


def describe_done(config: Config, manifest: Mapping[str, Any], run_dir: Path) -> str:
    """Return the sentence that a stage or part is up to date.

    Keys that decide no result (`config.keys.Incidental`) may have other values than it was made
    with. The sentence names them: who asks a finished stage for figures or trackers gets none.

    Args:
        config: the config of now.
        manifest: of the stage or part.
        run_dir: the run directory.
    """
    name = manifest["stage"]
    title = " ".join(filter(None, (name, manifest.get("part"))))
    told = f"{title} is up to date in {run_dir} for this config"
    sections = set(STAGES[name].sections)
    now = dict(leaves({k: v for k, v in config.model_dump(mode="json").items() if k in sections}))
    then = dict(leaves(manifest.get("config", {})))
    changed = [key for key, value in now.items() if key in then and then[key] != value]
    changed = [key for key in changed if key != STAGES[name].extended_by]
    if not changed:
        return told
    made, asked = _as_overrides(changed, then), _as_overrides(changed, now)
    return f"{told}, made with {made}; only --force would redo it with {asked}"


def _as_overrides(keys: Iterable[str], values: dict[str, Any]) -> str:
    return " ".join(f"{key}={json.dumps(values.get(key))}" for key in keys)
