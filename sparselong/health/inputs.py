"""The base checkpoint, its tokenizer and the rows, opened by the functions that stage 02 calls.

What is not on this machine yet cannot be opened: the finding says so. Rows are prepared in a
scratch copy of the run's data, so that this stage leaves no rows that a later one would have to
take.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparselong.config import Config
from sparselong.data import REPEATED, conversations
from sparselong.errors import StageError
from sparselong.health.sources import Source
from sparselong.tiny import (
    check_rows,
    early_tokenizer,
    encode_rows,
    open_base,
    open_tokenizer,
)

BASE, TOKENIZER, ROWS = "base checkpoint", "tokenizer", "conversations"
_HERE = ("here", "made")
_UNCHECKED_FIX = (
    "run this check again once the base's tokenizer is on this machine; stage 02 checks the rows "
    "before it compresses"
)
_REPEATED_FIX = "remove the repeated rows from data.train, or name others: data.validation=FILE"
_SCRATCH = re.compile(r"\.health-[a-z0-9_]{8}")
"""Names that tempfile gives to temporary run directories."""


@dataclass(frozen=True)
class Finding:
    """What became of opening one input.

    Attributes:
        role: what was opened.
        detail: one line about it, or why it was not opened.
        fix: what to do about a limitation in `detail`; empty if there is none.
        error: why stage 02 would refuse it, in stage 02's words.
    """

    role: str
    detail: str
    fix: str = ""
    error: StageError | None = None


def probe_inputs(
    config: Config, run_dir: Path, base: Source, data: tuple[Source, ...]
) -> tuple[Finding, ...]:
    """Open what is on this machine of the base, its tokenizer and the training data.

    Args:
        config: the config to run.
        run_dir: the run directory, which is not changed.
        base: the base model's source, with its directory if it is on this machine.
        data: the sources of the rows.
    """
    opened: list[Any] = []
    if base.path is None:
        findings = [Finding(BASE, f"not checked, since it is not here yet: {base.detail}")]
        opened += [each for each in [early_tokenizer(config, run_dir)] if each is not None]
    else:
        directory = base.path
        findings = [
            _try(BASE, lambda: _describe_base(directory)),
            _try(TOKENIZER, lambda: _describe_tokenizer(directory, opened)),
        ]
    absent = [source.name for source in data if source.state not in _HERE]
    if absent:
        findings.append(Finding(ROWS, f"not checked, since not here yet: {', '.join(absent)}"))
        return tuple(findings)
    with _scratch_copy(run_dir) as scratch:
        found = _try_rows(config, scratch, opened)
    if found.error is not None:  # stage 02 prepares the same rows in the run directory
        found = Finding(ROWS, "", error=_rename(found.error, str(scratch), str(run_dir)))
    return (*findings, found)


def _try(role: str, describe: Callable[[], str]) -> Finding:
    try:
        return Finding(role, describe())
    except StageError as error:
        return Finding(role, "", error=error)


def _rename(error: StageError, old: str, new: str) -> StageError:
    return StageError(
        error.what.replace(old, new),
        error.expected.replace(old, new),
        error.found.replace(old, new),
        error.fix.replace(old, new),
    )


def _describe_base(directory: Path) -> str:
    base, architecture = open_base(directory)
    tensors, layers = len(base.tensors), architecture.num_hidden_layers
    return f"{tensors} tensors of {layers} layers match config.json"


def _describe_tokenizer(directory: Path, opened: list[Any]) -> str:
    tokenizer = open_tokenizer(directory)
    opened.append(tokenizer)
    return f"{len(tokenizer)} tokens, all of which have embeddings"


def _try_rows(config: Config, run_dir: Path, opened: list[Any]) -> Finding:
    try:
        return _describe_rows(config, run_dir, opened)
    except StageError as error:
        return Finding(ROWS, "", error=error)


def _describe_rows(config: Config, run_dir: Path, opened: list[Any]) -> Finding:
    train, validation = check_rows(config, run_dir)
    said = [f"{train:,} training and {validation:,} validation conversations, well-formed"]
    if opened:
        _, left_out = encode_rows(config, run_dir, opened[0])
        said = [f"{said[0]}, can be encoded", *left_out]
    else:
        said = [
            f"{said[0]}; not encoded, since no tokenizer could be opened",
            *conversations.read_remarks(run_dir),
        ]
    fixes = [] if opened else [_UNCHECKED_FIX]
    fixes += [_REPEATED_FIX] * any(each.startswith(REPEATED) for each in said)
    return Finding(ROWS, "; ".join(said), "; ".join(fixes))


@contextmanager
def _scratch_copy(run_dir: Path) -> Iterator[Path]:
    """Provide a temporary run directory with a copy of the run's prepared data."""
    parent = run_dir if run_dir.is_dir() else None
    for left in run_dir.glob(".health-*") if parent else ():  # by a kill; the run is locked
        if _SCRATCH.fullmatch(left.name) and left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".health-", dir=parent) as folder:
        if (run_dir / "data").is_dir():
            shutil.copytree(run_dir / "data", Path(folder) / "data")
        yield Path(folder)
