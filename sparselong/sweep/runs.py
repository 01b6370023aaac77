"""The runs of a sweep: their names, configs and plans."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparselong.config import Config, load, read_grid, refuse_repeated
from sparselong.errors import ConfigError
from sparselong.run import stage_hash

STAGE = "03_finetune"
_LONGEST = 160
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")


@dataclass(frozen=True)
class Run:
    """A run of a sweep.

    Attributes:
        name: of its directory.
        dir: the run directory.
        config: the resolved config.
        values: value of each swept key, by dotted key.
        words: the overrides of its command line, swept keys last.
    """

    name: str
    dir: Path
    config: Config
    values: dict[str, Any]
    words: list[str]


def make_runs(arguments: Namespace, folder: Path) -> list[Run]:
    """Return the runs of a command line, the last key's values varying fastest.

    Args:
        arguments: the command line; `sweep` are its `KEY=VALUE,VALUE` arguments. One with a single
            value is an override for every run.
        folder: the sweep's directory.

    Raises:
        ConfigError: an argument cannot be read, a combination is not a valid config, a key is set
            twice or decides nothing of stage 03's result, or two combinations are the same.
    """
    grid = read_grid(arguments.sweep)
    single = [words[0] for words in grid.values() if len(words) == 1]
    fixed = [*arguments.overrides, *single]
    refuse_repeated(fixed)
    grid = {key: words for key, words in grid.items() if len(words) > 1}
    if not grid:
        raise ConfigError(
            "--sweep has one value for each key",
            "a key with several values, such as lora.r=8,16",
            " ".join(single),
            "leave out --sweep, or name more values, separated by commas",
        )
    _refuse_twice(grid, fixed)
    found = []
    for words in itertools.product(*grid.values()):
        config = load(arguments.config, [*fixed, *words])
        found.append((config, {key: _get(config, key) for key in grid}, [*fixed, *words]))
    _refuse_equal(grid, [(config, values) for config, values, _ in found])
    names = [_name(values) for _, values, _ in found]
    return [
        Run(name, folder / name, config, values, words)
        for name, (config, values, words) in zip(names, found, strict=True)
    ]


def _refuse_twice(grid: Mapping[str, Sequence[str]], fixed: Sequence[str]) -> None:
    """Raise if a key with several values is set beside the sweep."""
    for word in fixed:
        key = word.partition("=")[0]
        if key in grid:
            values = ", ".join(each.partition("=")[2] for each in grid[key])
            raise ConfigError(
                f"{key} is set beside the sweep over it",
                "one of the two",
                f"{word}, and the values {values}",
                f"leave out {word}",
            )


def _refuse_equal(
    grid: Mapping[str, Sequence[str]], found: Sequence[tuple[Config, dict[str, Any]]]
) -> None:
    """Raise if two combinations give one result of stage 03, and say which key is the reason."""
    first: dict[str, dict[str, Any]] = {}
    for config, values in found:
        same = first.setdefault(stage_hash(config, STAGE), values)
        if same is values:
            continue
        differing = [key for key in grid if json.dumps(same[key]) != json.dumps(values[key])]
        if differing:
            raise ConfigError(
                f"--sweep {differing[0]}: {STAGE}'s result does not depend on it",
                f"keys that decide the result of {STAGE}",
                f"the same result for {_show(same)} and {_show(values)}",
                f"leave out {differing[0]}, or run {STAGE}.py with each value to compare speed",
            )
        raise ConfigError(
            "two combinations of the sweep are the same",
            "different values of each key",
            f"{_show(values)} twice",
            "leave one of them out",
        )


def _show(values: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())


def _get(config: Config, key: str) -> Any:
    value: Any = config.model_dump(mode="json")
    for name in key.split("."):
        value = value[name]
    return value


def _name(values: Mapping[str, Any]) -> str:
    """Return the name of a run's directory, which no shell needs quotes for.

    It depends on the values alone, not on how or in which order they were written. Values that a
    name cannot show in full are followed by part of their hash.
    """
    lasts = {key: key.rpartition(".")[2] for key in sorted(values)}
    shown = {k: last if list(lasts.values()).count(last) == 1 else k for k, last in lasts.items()}
    name = ",".join(f"{short}={_text(values[key])}" for key, short in shown.items())
    if len(name) <= _LONGEST:
        return name
    return f"{name[:_LONGEST]}-{_digest(sorted(values.items()))}"


def _text(value: Any) -> str:
    """Return a value in letters, digits, and `. _ + -`."""
    plain = value if isinstance(value, str) else json.dumps(value)
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        plain = "+".join(value) or "none"
    safe = _UNSAFE.sub("-", plain.replace("2:4", "2-4")).strip("-")
    return safe if safe == plain or plain == "2:4" else f"{safe[:40]}-{_digest(value)}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]
