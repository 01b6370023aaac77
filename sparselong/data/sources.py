"""Where rows come from: the demo, files, hub datasets; which of them are held out, and which alike.

The many ways in which the Hugging Face Hub can fail become one error type.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any
from zlib import crc32

from sparselong.config import Config
from sparselong.data.lines import empty
from sparselong.data.rows import Conversation, Remarks, check_row, list_texts, read_rows
from sparselong.errors import StageError
from sparselong.files import is_local

_WORDS, _ALIKE = 8, 0.8
_MOST_HASHES = 20_000_000
_FACTOR = 0x9E3779B97F4A7C15
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


def find_repeated(train: list[Conversation], validation: list[Conversation]) -> list[str]:
    """Return a sentence for each file that repeats training rows nearly word by word.

    A row counts if 80 % of its sequences of eight words (of all its words, if there are fewer)
    occur in an earlier training row. Instructions are left out, because many rows share them; so
    is a row that a source's weight repeats.
    """
    import numpy  # a refusal does not wait for it

    own = list({id(row): row for row in train}.values())
    codes = _Codes()
    hashes = [_hash_words(row, codes) for row in (*own, *validation)]
    if (total := sum(map(len, hashes))) > _MOST_HASHES:  # look at a sample of the sequences
        step = numpy.uint64(total // _MOST_HASHES + 1)
        hashes = [each[each % step == 0] for each in hashes]
    bounds = numpy.cumsum([0, *map(len, hashes)])
    rows = numpy.repeat(numpy.arange(len(hashes)), numpy.diff(bounds))
    _, first, which = numpy.unique(
        numpy.concatenate(hashes), return_index=True, return_inverse=True
    )
    first_row = rows[first[which]]  # in which row each sequence occurs first
    seen = first_row < numpy.minimum(rows, len(own))
    shares = numpy.array(
        [seen[start:end].mean() if end > start else 0.0 for start, end in pairwise(bounds)]
    )
    alike = shares >= _ALIKE
    counts = int(alike[: len(own)].sum()), int(alike[len(own) :].sum())
    said = []
    if counts[0]:
        said.append(
            f"train: {counts[0]:,} of {len(own):,} conversations nearly repeat earlier ones"
        )
    if counts[1]:
        said.append(
            f"validation: {counts[1]:,} of {len(validation):,} conversations nearly repeat "
            "training conversations, so that the validation loss is too good"
        )
    return said


class _Codes(dict[str, int]):
    """A number for each word, the same in each process."""

    def __missing__(self, word: str) -> int:
        self[word] = crc32(word.encode())
        return self[word]


def _hash_words(row: Conversation, codes: _Codes) -> Any:
    """Return a hash of each sequence of eight words of a row without its instructions."""
    import numpy

    if "messages" in row:
        told = [each for each in row["messages"] if each["role"] not in ("system", "developer")]
        row = {"messages": told}
    words = [word for text in list_texts(row) for word in re.findall(r"\w+", text.lower())]
    words = words or [str(token) for token in row.get("input_ids", ())]
    numbers = numpy.fromiter(map(codes.__getitem__, words), numpy.uint64, len(words))
    count = min(_WORDS, len(words))
    hashes = numpy.zeros(len(words) - count + 1 if count else 0, numpy.uint64)
    for place in range(count):
        hashes = (hashes + numbers[place : place + len(hashes)]) * numpy.uint64(_FACTOR)
        hashes ^= hashes >> numpy.uint64(29)
    return numpy.unique(hashes)


def split(
    config: Config, folder: Path, said: list[str]
) -> tuple[list[Conversation], list[Conversation]]:
    """Return training and validation conversations; add what should be told to `said`.

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
        held_out = _hold_out(config, sum(map(len, read)))
        validation = [row for i, row in enumerate(chain(*read)) if i in held_out]
    numbered = enumerate(chain(*read))
    kept = [[row for i, row in islice(numbered, len(rows)) if i not in held_out] for rows in read]
    return _mix(config, kept, said), validation


def _hold_out(config: Config, total: int) -> set[int]:
    """Return the places of validation rows among all rows."""
    if total < 2:
        raise StageError(
            f"{' and '.join(share.source for share in config.data.shares)} is too small to hold "
            "out a validation conversation",
            "at least 2 conversations, or data.validation",
            f"{total}",
            "add rows, or name a validation file: data.validation=FILE.jsonl",
        )
    count = min(max(1, round(config.data.validation_fraction * total)), total - 1)
    return set(random.Random(config.seed).sample(range(total), count))


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
