"""Conversations: two checked files from the configured data sources, and tokens from their rows.

Every stage that needs text calls `prepare` first. It turns the demo, files or hub datasets into
`runs/NAME/data/train.jsonl` and `validation.jsonl`, with one checked conversation per line
(rows.py). `source.json` is written last and records the sources. Later or repeated stages find
the same rows. If a config key changes, the files are rebuilt; finished stages are stale then,
because their hashes cover these keys. If the *content* of a source file changes, `prepare` refuses,
because no hash would show that earlier stages of the run used other rows; when stage 02 starts
over, `accept_new_sources` lets it read the new content.

`tokenize` (tokens.py) renders a conversation with the model's own chat template and marks the
assistant's tokens. `locate` names the file and line that a conversation comes from.

Left out: images, several tool calls in a message, and filtering by content.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from sparselong.config import Config
from sparselong.data.lines import TABLES, count_lines, read_file
from sparselong.data.rows import (
    Conversation,
    Remarks,
    check_row,
    is_prepared,
    list_texts,
    locate,
    read_rows,
)
from sparselong.data.sources import FILE_NAMES, split
from sparselong.data.tokens import count_dropped_thinking, tokenize
from sparselong.errors import StageError
from sparselong.files import load_json, write_atomically
from sparselong.provenance import find_change, hash_file

__all__ = [
    "Conversation",
    "DataFiles",
    "accept_new_sources",
    "count_dropped_thinking",
    "find_sources",
    "forget",
    "list_texts",
    "locate",
    "prepare",
    "read",
    "read_line",
    "read_remarks",
    "tokenize",
]

_RECORD = "source.json"
_FORMAT = 2  # of the prepared lines


class DataFiles(NamedTuple):
    """Paths of the two prepared files."""

    train: Path
    validation: Path


def prepare(config: Config, run_dir: Path) -> DataFiles:
    """Return `run_dir/data/{train,validation}.jsonl`, written first unless up to date.

    What was passed over while the sources were read is recorded for `read_remarks`.

    Raises:
        StageError: a source is missing, unreachable, empty or has changed, or a row is refused
            (the message names file and line).
    """
    folder = run_dir / "data"
    files = DataFiles(*(folder / name for name in FILE_NAMES))
    record_path = folder / _RECORD
    wanted = {
        "seed": config.seed,
        **config.data.model_dump(mode="json", exclude={"train_on", "date"}),
    }
    if record_path.exists() and files.train.exists() and files.validation.exists():
        record = _read_record(record_path)
        if record["config"] == wanted:
            _refuse_changed(record, folder)
            if record.get("format") == _FORMAT:
                return files
    else:  # a kill may have left prepared files without their record
        _refuse_replacing_unprepared(files)
    record_path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    described = [
        _describe(Path(source))
        for source in config.data.named.values()
        if source != "demo" and os.path.isfile(source)
    ]
    said: list[str] = []
    train, validation = split(config, folder, said)
    from sparselong.data.overlap import find_repeated  # a refusal does not wait for numpy

    said += find_repeated(train, validation)
    for path, rows in zip(files, (train, validation), strict=True):
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    record = {
        "format": _FORMAT,
        "config": wanted,
        "sources": described,
        "files": [_describe(path) for path in files],
        "conversations": {"train": len(train), "validation": len(validation)},
        "remarks": said,
    }
    write_atomically(record_path, json.dumps(record, indent=1) + "\n")
    return files


def find_sources(config: Config, run_dir: Path) -> dict[str, dict[str, Any]]:
    """Return rows of the local files from which the rows were prepared, by config key."""
    record = _read_record(run_dir / "data" / _RECORD)
    rows = {row["path"]: row for row in record["sources"]}
    return {
        key: {**rows[path], "path": os.path.abspath(path)}
        for key, source in config.data.named.items()
        if (path := str(Path(source))) in rows
    }


def accept_new_sources(run_dir: Path) -> None:
    """Let `prepare` read sources again that have changed, because all stages are redone.

    Raises:
        StageError: a prepared file has changed, which would be replaced.
    """
    folder = run_dir / "data"
    if not (folder / _RECORD).exists():
        return
    record = _read_record(folder / _RECORD)
    _refuse_changed({**record, "sources": []}, folder)
    places = [(Path(was["path"]), was) for was in record["sources"]]
    if any(os.path.exists(path) and find_change(path, was) for path, was in places):
        (folder / _RECORD).unlink()


def forget(run_dir: Path) -> None:
    """Let `prepare` read the sources again, because a row was refused before anything was made."""
    (run_dir / "data" / _RECORD).unlink(missing_ok=True)


def read(path: Path) -> list[Conversation]:
    """Return the conversations of a prepared file after checking every row again.

    Raises:
        StageError: the file cannot be read or is empty, or a row is refused.
    """
    return list(read_rows(path, Remarks(), prepared=True))


def read_remarks(run_dir: Path) -> tuple[str, ...]:
    """Return what was passed over while the prepared files' sources were read, as sentences."""
    return tuple(_read_record(run_dir / "data" / _RECORD).get("remarks", ()))


def read_line(path: Path, number: int) -> Conversation:
    """Return the conversation that starts on one line of a file, counted from 1; of Parquet, a row.

    Raises:
        StageError: the file cannot be read or has fewer lines, no row starts on the line, it or an
            earlier one cannot be read, or the row is refused.
    """
    lines, before, columnar = 0, 0, path.suffix.lower() in TABLES
    unit = "row" if columnar else "line"
    for lines, row in read_file(path):
        if lines == number and row is not None:
            origin = {"source": str(path), unit: number}
            return check_row(row, origin, Remarks(), columnar=columnar)
        if lines >= number:
            break
        before = lines
    fix = f"name another {unit}"
    if lines == number:
        raise StageError(f"{path}, line {number:,} is blank", "a conversation", "no text", fix)
    if path.suffix.lower() == ".csv" and 0 < number <= max(lines, count_lines(path)):
        raise _inside(path, number, before)
    known = f"a line from 1 to {lines:,}" if lines else "a file with lines"
    raise StageError(f"{path} has no line {number:,}", known, f"line {number:,}", fix)


def _inside(path: Path, number: int, before: int) -> StageError:
    """Return the error about a line of a CSV file in which no row begins.

    Args:
        path: the file.
        number: the line.
        before: the line in which the row before it begins; 0 without one.
    """
    expected = "a line in which a row begins"
    if not before:
        found = "the names of the columns"
        return StageError(
            f"{path}, line {number:,} is of the header", expected, found, "name a row"
        )
    return StageError(
        f"{path}, line {number:,} is inside the row that begins in line {before:,}",
        expected,
        "more lines of a quoted cell",
        f"name line {before:,}",
    )


def _read_record(path: Path) -> dict[str, Any]:
    """Return source.json; raise if it is not what `prepare` wrote."""
    try:
        record = load_json(path)
        known = record["config"], record["sources"], record["files"]
        if all(isinstance(part, dict | list) for part in known):
            return record
        reason = "other values"
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise StageError(
        f"{path} is damaged",
        "the record of the sources that this run read",
        reason,
        f"use another --run-dir, or delete {path.parent} and rerun the stages",
    )


def _refuse_replacing_unprepared(files: DataFiles) -> None:
    """Raise if a file that is about to be replaced is not a prepared one."""
    for path in files:
        if path.exists() and not is_prepared(path):
            raise StageError(
                f"{path} was not written by a stage and would be replaced",
                "no such file, or conversations that a stage prepared",
                "something else",
                "pass another --run-dir, or move the file away",
            )


def _describe(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {
        "path": str(path),
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "sha256": hash_file(path),
    }


def _refuse_changed(record: dict[str, Any], folder: Path) -> None:
    """Raise if a prepared file or an existing source no longer matches its recorded hash."""
    prepared = [
        {**was, "path": folder / name}
        for was, name in zip(record["files"], FILE_NAMES, strict=True)
    ]
    for was, delete in [
        *((was, "") for was in record["sources"]),
        *((was, f"delete {folder} and ") for was in prepared),
    ]:
        path = Path(was["path"])
        if os.path.exists(path) and (change := find_change(path, was)):
            raise StageError(
                f"{path} has changed since this run read it",
                f"{was['bytes']} bytes with sha256 {was['sha256']}",
                change,
                f"use another --run-dir for the new rows, or {delete}redo all stages: "
                "python 02_compress.py --force",
            )
