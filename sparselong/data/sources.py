"""Where rows come from: the demo, files, hub datasets; which of them are held out.

The many ways in which the Hugging Face Hub can fail become one error type.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
    """Return training and validation conversations; add what was passed over to `said`."""
    if config.data.train == "demo":
        from sparselong.data.demo import write_demo_data

        write_demo_data(folder / "demo", config.seed)
        train, validation = (
            list(read_rows(folder / "demo" / name, Remarks(), f"demo/{name}"))
            for name in FILE_NAMES
        )
    else:
        train, validation = _read_source(config.data.train, said), []
    if config.data.validation:
        return train, _read_source(config.data.validation, said)
    if validation:
        return train, validation
    if len(train) < 2:
        raise StageError(
            f"{config.data.train} is too small to hold out a validation conversation",
            "at least 2 conversations, or data.validation",
            f"{len(train)}",
            "add rows, or name a validation file: data.validation=FILE.jsonl",
        )
    count = min(max(1, round(config.data.validation_fraction * len(train))), len(train) - 1)
    held_out = set(random.Random(config.seed).sample(range(len(train)), count))
    return (
        [row for i, row in enumerate(train) if i not in held_out],
        [row for i, row in enumerate(train) if i in held_out],
    )


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
