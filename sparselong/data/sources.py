"""Where rows come from: the demo, files, hub datasets; and which of them are held out.

The many ways in which the Hugging Face Hub can fail become one error type.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

from sparselong.config import Config
from sparselong.data.lines import empty
from sparselong.data.rows import Conversation, Remarks, check_row, read_rows
from sparselong.errors import StageError
from sparselong.files import is_local

FILE_NAMES = ("train.jsonl", "validation.jsonl")
"""Names of the two prepared files."""


@contextmanager
def explain_hub_failures(what: str, expected: str, fix: str) -> Iterator[None]:
    """Raise a StageError if a lookup or download inside the block fails.

    The exception of an unreachable hub depends on where the connection breaks: offline mode and
    refused names raise OSError, a closed client RuntimeError, a missing configuration ValueError, a
    timeout httpx's own error. The block should therefore contain only the call to the hub.
    """
    import httpx
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, RuntimeError, ValueError, DatasetsError, httpx.HTTPError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise StageError(what, expected, f"{type(error).__name__}: {first_line}", fix) from error


def split(
    config: Config, folder: Path, said: list[str]
) -> tuple[list[Conversation], list[Conversation]]:
    """Return training and validation conversations; append what to report to `said`.

    Rows are held out before any is repeated, so that none is in both.
    """
    if config.data.train == "demo":
        from sparselong.data.demo import write_demo_data

        write_demo_data(folder / "demo", config.seed)
        train, validation = (
            list(read_rows(folder / "demo" / name, Remarks(), f"demo/{name}"))
            for name in FILE_NAMES
        )
        if config.data.validation:
            validation = _read_source(config.data.validation, said)
        return train, validation
    read = [_read_source(share.source, said) for share in config.data.shares]
    if config.data.validation:
        validation, held_out = _read_source(config.data.validation, said), set()
    else:
        held_out = _hold_out(config, [len(rows) for rows in read], said)
        validation = [row for i, row in enumerate(chain(*read)) if i in held_out]
    numbered = enumerate(chain(*read))
    kept = [[row for i, row in islice(numbered, len(rows)) if i not in held_out] for rows in read]
    return _mix(config, kept, said), validation


def _hold_out(config: Config, sizes: list[int], said: list[str]) -> set[int]:
    """Return the places of validation rows among the rows of all sources, one after another.

    Each source gives its fraction of rows, and at least one unless it has no other. Append how many
    to `said` if there are several sources.
    """
    total = sum(sizes)
    if total < 2:
        raise StageError(
            f"{' and '.join(share.source for share in config.data.shares)} is too small to hold "
            "out a validation conversation",
            "at least 2 conversations, or data.validation",
            f"{total}",
            "add rows, or name a validation file: data.validation=FILE.jsonl",
        )
    counts = [min(max(1, round(config.data.validation_fraction * n)), n - 1) for n in sizes]
    if not any(counts):  # sources of one row each
        counts[-1] = 1
    generator, held_out, first = random.Random(config.seed), set(), 0
    for size, count in zip(sizes, counts, strict=True):
        held_out.update(generator.sample(range(first, first + size), count))
        first += size
    if len(sizes) > 1:
        named = zip(counts, config.data.shares, strict=True)
        parts = ", ".join(f"{count:,} of {share.source}" for count, share in named)
        said.append(f"validation: {len(held_out):,} conversations held out: {parts}")
    return held_out


def _mix(config: Config, read: list[list[Conversation]], said: list[str]) -> list[Conversation]:
    """Return the rows of all sources, each as often as the weights say."""
    total, shares = sum(map(len, read)), config.data.shares
    weights = [share.weight or 0.0 for share in shares]
    if not any(weights):
        return [*chain(*read)]
    mixed: list[Conversation] = []
    bounds = [round(total * sum(weights[:i]) / sum(weights)) for i in range(len(weights) + 1)]
    for i, (share, rows) in enumerate(zip(shares, read, strict=True)):
        wanted = bounds[i + 1] - bounds[i]
        if not rows or not wanted:
            raise StageError(
                f"{share.source} cannot have the weight {share.weight:g}",
                "at least one of its rows to train on",
                f"{wanted:,} of {total:,} training examples, from {len(rows):,} rows",
                "change the weights in data.train, or remove the source",
            )
        times, rest = divmod(wanted, len(rows))
        drawn = sorted(random.Random(f"{config.seed} {i}").sample(range(len(rows)), rest))
        mixed += rows * times + [rows[place] for place in drawn]
        said.append(
            f"{share.source}: {wanted:,} training examples ({wanted / total:.1%}) from "
            f"{len(rows):,} rows, each {wanted / len(rows):.3g} times"
        )
    return mixed


def _read_source(source: str, said: list[str]) -> list[Conversation]:
    remarks = Remarks()
    rows = list(
        read_rows(Path(source), remarks) if is_local(source) else _read_hub(source, remarks)
    )
    said += remarks.sentences(source)
    return rows


def _read_hub(name: str, remarks: Remarks) -> Iterator[Conversation]:
    import datasets

    with explain_hub_failures(
        f"dataset {name} cannot be opened",
        "a file of that name, or a hub dataset with a train split",
        "check the name and the network (HF_HUB_OFFLINE, HF_TOKEN), or name a local file: "
        "data.train=FILE.jsonl",
    ):
        rows: Iterable[Any] = datasets.load_dataset(name, split="train")
    number = 0
    for number, row in enumerate(rows, 1):
        yield check_row(row, {"source": f"dataset {name}", "row": number}, remarks, columnar=True)
    if not number:
        raise empty(f"dataset {name}", "no rows")
