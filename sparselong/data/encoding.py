"""The prepared conversations as tokens: encoded once, and read by every stage.

Calibration, training and perplexity must see the same tokens. `encode_files` therefore tokenizes
the two prepared files once and stores them as Arrow files, whose column types are fixed here rather
than inferred from the rows. A later stage reads the stored tokens if they were made from the same
files with the same tokenizer, template, date and `data.train_on`; otherwise they are made again.

    runs/NAME/data/encoded/train.arrow  validation.arrow    a row per conversation, in file order
                           encoded.json                     written last: what they were made from

All rows are stored, because calibration uses conversations of any length. Training, its evaluations
and stage 04's perplexity use the rows that `select_usable` returns: one rule, so that a model has
one perplexity. It leaves out those longer than `sequence_len`, so their turns are not looked for,
and no token of them is marked.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pyarrow

from sparselong.config import Config
from sparselong.data import conversations
from sparselong.data.run_date import rendering_date
from sparselong.errors import StageError
from sparselong.files import load_json
from sparselong.provenance import hash_file

_FORMAT = 2
"""Increased with other columns, or other tokens from `conversations.tokenize` for the same row."""
_ROWS_PER_BATCH = 1000
_SCHEMA = pyarrow.schema(
    {
        "input_ids": pyarrow.large_list(pyarrow.int32()),
        "supervised": pyarrow.large_list(pyarrow.bool_()),
        "dropped_thinking": pyarrow.int32(),  # messages whose reasoning the template leaves out
    }
)
_RECORD = "encoded.json"
_BAR = 40  # characters of the longest bar of a histogram


@dataclass(frozen=True)
class Encoded:
    """The tokens of a prepared file's conversations, in its order, mapped from disk.

    Attributes:
        source: the prepared file.
        table: a row per conversation: `input_ids`, of the same length `supervised`, and
            `dropped_thinking`.
    """

    source: Path
    table: pyarrow.Table

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, row: int) -> tuple[list[int], list[bool]]:
        """Return a conversation's tokens and which of them are supervised."""
        one = self.table.slice(row, 1).to_pydict()
        return one["input_ids"][0], one["supervised"][0]

    @cached_property
    def counts(self) -> list[Counts]:
        """The token counts of each conversation."""
        return [counts for batch in self.table.to_batches() for counts in _count(batch)]


class Counts(NamedTuple):
    """A conversation's number of tokens.

    Attributes:
        tokens: all of them.
        supervised: those that are supervised.
        predicted: the supervised ones except for the first token, which nothing predicts.
    """

    tokens: int
    supervised: int
    predicted: int


class EncodedFiles(NamedTuple):
    """Both prepared files as tokens.

    Attributes:
        train: the training conversations.
        validation: the held-out conversations.
        date: the date that the template rendered.
        remarks: sentences about what was passed over while the sources were read.
    """

    train: Encoded
    validation: Encoded
    date: date
    remarks: tuple[str, ...] = ()


class Usable(NamedTuple):
    """The rows of each file that training and perplexity use, ascending; and what is left out.

    Attributes:
        train: row numbers of `EncodedFiles.train`.
        validation: row numbers of `EncodedFiles.validation`.
        left_out: sentences about what is left out, with counts: blank lines and keys of the
            sources, other rows, and reasoning that the template does not write.
    """

    train: list[int]
    validation: list[int]
    left_out: list[str]


def encode_files(config: Config, run_dir: Path, tokenizer: Any) -> EncodedFiles:
    """Return the run's conversations as tokens, encoded first unless that is done.

    The files are replaced atomically and have the same bytes whoever writes them, so several
    processes may call this at once.

    Args:
        config: the run's config.
        run_dir: the run directory.
        tokenizer: the base model's tokenizer, or stage 02's copy of it.

    Raises:
        StageError: the data cannot be read, or the chat template rejects a row.
    """
    files = conversations.prepare(config, run_dir)
    today = rendering_date(config, run_dir)
    folder = run_dir / "data" / "encoded"
    wanted = {
        "format": _FORMAT,
        "conversations": [hash_file(path) for path in files],
        "tokenizer": _fingerprint(tokenizer),
        "train_on": config.data.train_on,
        "sequence_len": config.sequence_len,
        "date": today.isoformat(),
    }
    paths = [folder / f"{path.stem}.arrow" for path in files]
    if not _is_current(folder / _RECORD, wanted, paths):
        folder.mkdir(parents=True, exist_ok=True)
        for source, path in zip(files, paths, strict=True):
            _encode(source, path, tokenizer, config, today)
        record = {"made_from": wanted, "sha256": [hash_file(path) for path in paths]}
        with _replacing(folder / _RECORD) as partial:
            partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    train, validation = (Encoded(*pair) for pair in zip(files, map(_map, paths), strict=True))
    return EncodedFiles(train, validation, today, conversations.read_remarks(run_dir))


def _count(batch: pyarrow.RecordBatch) -> Iterator[Counts]:
    flags = batch["supervised"]
    ends = flags.offsets.to_numpy() - flags.offsets[0].as_py()
    sums = numpy.concatenate([[0], numpy.cumsum(flags.flatten().to_numpy(zero_copy_only=False))])
    for start, end in pairwise(ends.tolist()):
        second = min(start + 1, end)
        yield Counts(end - start, int(sums[end] - sums[start]), int(sums[end] - sums[second]))


def select_usable(files: EncodedFiles, sequence_len: int) -> Usable:
    """Return the rows that fit into `sequence_len` tokens and have a supervised token to predict.

    Args:
        files: the encoded files.
        sequence_len: the length with which they were encoded, or less.

    Raises:
        StageError: a file has no such row.
    """
    train, validation = (_fitting(encoded, sequence_len) for encoded in files[:2])
    left_out = [
        _describe_left_out(encoded, len(rows), sequence_len)
        for encoded, rows in zip(files[:2], (train, validation), strict=True)
        if len(rows) < len(encoded)
    ]
    if train and validation:
        dropped = filter(None, map(_describe_dropped, files[:2]))
        return Usable(train, validation, [*files.remarks, *left_out, *dropped])
    shortest = [
        min((n.tokens for n in encoded.counts if n.predicted or n.tokens > sequence_len), default=0)
        for encoded in files[:2]
    ]
    raise StageError(
        f"no {'validation' if train else 'train'} conversation can be used",
        f"conversations of at most {sequence_len:,} tokens (sequence_len) with supervised tokens",
        "; ".join(left_out),
        f"use shorter conversations, or sequence_len={max(shortest)}, the smallest that would do"
        if all(shortest)
        else "check the rows' roles and weights, or pass another data.train_on",
    )


def describe_lengths(encoded: Encoded, rows: list[int]) -> list[str]:
    """Return lines about rows of a file: their tokens, and a histogram of their lengths.

    Args:
        encoded: a prepared file's tokens.
        rows: numbers of the rows that are used, at least one.
    """
    lengths = numpy.array([encoded.counts[row].tokens for row in rows])
    supervised = sum(encoded.counts[row].supervised for row in rows)
    middle, most = numpy.percentile(lengths, (50, 95), method="lower")
    lines = [
        f"{encoded.source.stem}: {len(rows):,} conversations, {lengths.sum():,} tokens, "
        f"{supervised:,} of them supervised ({supervised / lengths.sum():.1%}); lengths "
        f"{lengths.min():,} to {lengths.max():,}, half up to {middle:,}, 95 % up to {most:,}"
    ]
    steps = numpy.ceil(numpy.log2(lengths)).astype(int)
    counts = {step: int((steps == step).sum()) for step in range(steps.min(), steps.max() + 1)}
    for step, count in counts.items():
        bar = "#" * round(_BAR * count / max(counts.values()))
        lines.append(f"  up to {2**step:>9,} tokens {count:>9,} {bar}".rstrip())
    return lines


def _describe_dropped(encoded: Encoded) -> str | None:
    counts = [count for count in encoded.table["dropped_thinking"].to_pylist() if count]
    if not counts:
        return None
    return (
        f"{encoded.source.stem}: the chat template leaves out the thinking of {sum(counts):,} "
        f"turns, in {len(counts):,} of {len(encoded):,} conversations"
    )


def _fitting(encoded: Encoded, sequence_len: int) -> list[int]:
    counted = enumerate(encoded.counts)
    return [row for row, n in counted if n.predicted and n.tokens <= sequence_len]


def _describe_left_out(encoded: Encoded, used: int, sequence_len: int) -> str:
    total, reasons = len(encoded), []
    long = [count.tokens for count in encoded.counts if count.tokens > sequence_len]
    if long:
        lengths = f"{min(long):,} to {max(long):,}" if len(long) > 1 else f"{long[0]:,}"
        reasons.append(
            f"{len(long):,} longer than sequence_len {sequence_len:,} ({lengths} tokens)"
        )
    if total - used > len(long):
        reasons.append(f"{total - used - len(long):,} without supervised tokens")
    name = encoded.source.stem
    return f"{name}: {total - used:,} of {total:,} conversations left out: {', '.join(reasons)}"


def _encode(source: Path, path: Path, tokenizer: Any, config: Config, today: date) -> None:
    """Tokenize the conversations of a prepared file into an Arrow file."""
    with (
        _replacing(path) as partial,
        pyarrow.OSFile(str(partial), "wb") as sink,
        pyarrow.ipc.new_file(sink, _SCHEMA) as out,
    ):
        for batch in _batches(_tokenize(source, tokenizer, config, today)):
            columns = dict(zip(_SCHEMA.names, zip(*batch, strict=True), strict=True))
            out.write_table(pyarrow.table(columns, _SCHEMA))


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a path of this call alone, which becomes `path` at the end, or vanishes."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _tokenize(
    source: Path, tokenizer: Any, config: Config, today: date
) -> Iterator[tuple[list[int], list[bool], int]]:
    """Yield the values of each row's columns."""
    train_on, longest = config.data.train_on, config.sequence_len
    for row in conversations.read(source):
        tokens, supervised = conversations.tokenize(row, tokenizer, train_on, today, longest)
        dropped = conversations.count_dropped_thinking(row, tokenizer, today)
        yield tokens, supervised, dropped


def _batches(rows: Iterator[tuple]) -> Iterator[list[tuple]]:
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == _ROWS_PER_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _map(path: Path) -> pyarrow.Table:
    return pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()


def _is_current(record_path: Path, wanted: dict[str, Any], paths: list[Path]) -> bool:
    """Return whether the stored tokens are whole and were made from what is wanted."""
    if not all(path.is_file() for path in (record_path, *paths)):
        return False
    try:
        record = load_json(record_path)
    except ValueError:
        return False
    hashes = [hash_file(path) for path in paths]
    return record == {"made_from": wanted, "sha256": hashes}


def _fingerprint(tokenizer: Any) -> str:
    """Return a hash of everything in a tokenizer that decides a conversation's tokens."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Set by whoever used the tokenizer last; `conversations.tokenize` uses neither.
    del backend["truncation"], backend["padding"]
    parts = [backend, tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
