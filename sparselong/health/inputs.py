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
from sparselong.data import conversations
from sparselong.errors import StageError
from sparselong.health.sources import Source
from sparselong.tiny import check_rows, encode_rows, open_base, open_tokenizer

BASE, TOKENIZER, ROWS = "base checkpoint", "tokenizer", "conversations"
_HERE = ("here", "made")
_SCRATCH = re.compile(r"\.health-[a-z0-9_]{8}")
"""Names that tempfile gives to temporary run directories."""


@dataclass(frozen=True)
class Finding:
    """What became of opening one input.

    Attributes:
        role: what was opened.
        detail: one line about it, or why it was not opened.
        error: why stage 02 would refuse it, in stage 02's words.
    """

    role: str
    detail: str
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
        found = _try(ROWS, lambda: _describe_rows(config, scratch, opened))
    if found.error is not None:  # stage 02 prepares the same rows in the run directory
        found = Finding(ROWS, "", _rename(found.error, str(scratch), str(run_dir)))
    return (*findings, found)


def _try(role: str, describe: Callable[[], str]) -> Finding:
    try:
        return Finding(role, describe())
    except StageError as error:
        return Finding(role, "", error)


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


def _describe_rows(config: Config, run_dir: Path, opened: list[Any]) -> str:
    count = check_rows(config, run_dir)
    for tokenizer in opened:
        _, left_out = encode_rows(config, run_dir, tokenizer)
        return "; ".join([f"{count} well-formed conversations can be encoded", *left_out])
    said = f"{count} well-formed conversations; not encoded, since no tokenizer could be opened"
    return "; ".join([said, *conversations.read_remarks(run_dir)])


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
