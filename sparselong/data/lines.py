"""Rows of a file that somebody else wrote: JSON lines, or by suffix a Parquet or CSV table.

A line of JSON is what ends in a line feed or carriage return; U+2028 and its like may stand inside
strings. Accepted: a byte order mark (also inside, where files were concatenated), CRLF, blank
lines, which the caller counts, and NaN, which Python writes into columns that have no value and
which is read as null. Refused with file and line: bytes that are not UTF-8, keys that occur twice
in an object, numbers and nesting that Python does not read.

A CSV file has a header, commas and quotes; cells of columns that hold lists, objects or weights are
JSON. An empty cell is no value. A Parquet file's rows are counted from 1, CSV rows by their lines.
"""

from __future__ import annotations

import csv
import io
import json
import reprlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sparselong.errors import StageError
from sparselong.files import LFS_POINTER, parse_json

SHAPE = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'
EMPTY = (None, "", [], {})
"""Values that mean the same as no value."""
TABLES = (".parquet",)
"""Suffixes of files in which absent keys are null, and rows have no lines."""
_TAKEN = (
    "data.train and data.validation take a file of JSON lines, .parquet or .csv, a hub dataset, or "
    "demo"
)
_JSON_CELLS = (
    *("messages", "conversations", "tools", "input_ids", "labels", "attention_mask"),
    *("chat_template_kwargs", "weight", "train"),
)
_FIX = "fix or remove the line; turn a JSON array into one object per line"
_CSV = "a CSV file with a header, and as many cells in each row"
_ROWS_PER_BATCH = 1000
_KEYS_SHOWN = 12
_FORMATS = (
    (b"\x1f\x8b", "gzip-compressed data", "unpack the file with gunzip"),
    (b"PK\x03\x04", "a zip archive", "unpack the file"),
    (b"BZh", "bzip2-compressed data", "unpack the file with bunzip2"),
    (b"\xfd7zXZ", "xz-compressed data", "unpack the file with unxz"),
    (b"\x28\xb5\x2f\xfd", "zstandard-compressed data", "unpack the file with unzstd"),
    (b"PAR1", "a Parquet file", "name it *.parquet"),
    (b"ARROW1", "an Arrow file", "convert it to JSON lines"),
    (LFS_POINTER.encode(), "a Git LFS pointer", "fetch the file with git lfs pull"),
    (b"\xff\xfe", "UTF-16 text", "save the file as UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "save the file as UTF-8"),
    (b"\0\0\xfe\xff", "UTF-32 text", "save the file as UTF-8"),
    (b"{\0", "UTF-16 text", "save the file as UTF-8"),
    (b"\0{", "UTF-16 text", "save the file as UTF-8"),
)


class Fault(Exception):
    """What is wrong with a row.

    Args:
        found: what was found.
        fix: what to do about it.
        expected: what was expected.
    """

    def __init__(self, found: str, fix: str = "fix or remove the row", expected: str = SHAPE):
        super().__init__(found)
        self.found, self.fix, self.expected = found, fix, expected


def read_file(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line or row number, row) of a file, which its suffix says how to read.

    Raises:
        StageError: the file cannot be read, or a row is no object.
    """
    suffix = path.suffix.lower()
    if suffix in TABLES:
        return _read_parquet(path)
    return _read_csv(path) if suffix == ".csv" else read_lines(path)


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    _refuse_other_formats(path, known=b"PAR1")
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if twice := _find_twice(file.schema_arrow):
                raise _unreadable(path, f"two columns {twice}", "rename one of them", "other names")
            done = 0
            for batch in file.iter_batches(_ROWS_PER_BATCH):
                for number, row in enumerate(_list_rows(batch, path, done), done + 1):
                    yield number, {k: None if v != v else v for k, v in row.items()}
                done += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        found = (str(error).splitlines() or [type(error).__name__])[0]
        raise _unreadable(path, found, "write the file again", "a Parquet file") from error


def _list_rows(batch: Any, path: Path, before: int) -> list[dict[str, Any]]:
    """Return the rows of a batch; raise with the number of one that Python cannot hold.

    Args:
        batch: a record batch.
        path: the file.
        before: number of rows before the batch.
    """
    rows: list[dict[str, Any]] = []
    try:
        return batch.to_pylist()
    except (OverflowError, ValueError):  # a text that is not UTF-8, a date in the year 100,000
        for place in range(batch.num_rows):
            try:
                rows += batch.slice(place, 1).to_pylist()
            except (OverflowError, ValueError) as error:
                raise StageError(
                    f"{path}, row {before + place + 1} cannot be read",
                    "UTF-8 texts, and values that Python can hold",
                    str(error),
                    "correct or remove the row, or the column",
                ) from error
    return rows


def _find_twice(fields: Any) -> str | None:
    """Return the name of two columns, or of two fields of a structure; None if there are none."""
    names = [field.name for field in fields]
    for field in fields:
        if names.count(field.name) > 1:
            return field.name
        kind = field.type
        inner = [kind.field(i) for i in range(kind.num_fields)]
        if twice := _find_twice(inner):
            return f"{field.name}.{twice}"
    return None


def _read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    _refuse_other_formats(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        found = f"byte 0x{error.object[error.start]:02x} on line {line}"
        raise _unreadable(path, found, "save the file as UTF-8") from error
    except OSError as error:
        raise _unreadable(path, str(error)) from error
    rows = _parse_csv(path, text)
    header = rows[0][1] if rows else []
    if len(set(header)) < len(header) or not all(header):
        raise _unreadable(path, f"the header {show_keys(header)}", "name each column once", _CSV)
    for line, cells in rows[1:]:
        if not cells:
            yield line, None
        elif len(cells) != len(header):
            found = f"{len(cells)} cells, but {len(header)} columns"
            raise StageError(f"{path}, line {line} is not a row", _CSV, found, "quote the cells")
        else:
            pairs = zip(header, cells, strict=True)
            yield line, {key: _read_cell(key, cell, path, line) for key, cell in pairs}


def count_lines(path: Path) -> int:
    """Return the number of lines of a text file."""
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _parse_csv(path: Path, text: str) -> list[tuple[int, list[str]]]:
    """Return (first line, cells) of each row."""
    limit = csv.field_size_limit(sys.maxsize)  # the default refuses texts over 128 KiB
    rows, line = [], 1
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for cells in reader:
            rows.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise StageError(f"{path}, line {line} is not a row", _CSV, str(error), _FIX) from error
    finally:
        csv.field_size_limit(limit)
    return rows


def _read_cell(key: str, cell: str, path: Path, line: int) -> Any:
    if key not in _JSON_CELLS or not cell.strip():
        return cell or None
    try:
        return parse_json(cell, _constant)
    except ValueError as error:
        raise StageError(
            f"{path}, line {line}: `{key}` is not JSON",
            "JSON in cells that hold lists, objects or weights",
            f"{error}: {shown(cell)}",
            "write the column with json.dumps, or the file as JSON lines",
        ) from error


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, parsed line); a blank line is parsed as None.

    Raises:
        StageError: the file cannot be read, or a line is not JSON.
    """
    _refuse_other_formats(path)
    try:
        # Bytes that are not UTF-8 become surrogates, so that their line is known.
        with path.open(encoding="utf-8", errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix("\ufeff")
                # A line that holds null means something; it must not pass for a blank one.
                yield number, _parse(line, f"{path}, line {number}") if line.strip() else None
    except OSError as error:
        raise _unreadable(path, str(error)) from error


def empty(source: str, found: str) -> StageError:
    """Return the error about a source without rows."""
    return StageError(f"{source} is empty", f"one row per line: {SHAPE}", found, _TAKEN)


def check_text(text: str, name: str) -> str:
    """Return the text; raise if it contains half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Fault(
            f"{name} has half of a surrogate pair, \\u{ord(text[error.start]):04x}, at character "
            f"{error.start + 1}",
            "write the whole character, or remove the row",
            "Unicode text",
        ) from error
    return text


def shown(value: Any) -> str:
    """Return a value as short text that can be printed anywhere."""
    return reprlib.repr(value).encode("utf-8", "backslashreplace").decode("utf-8")


def show_keys(keys: Iterable[str]) -> str:
    """Return names of keys or columns as short text, the first ones of many."""
    names = list(keys)
    more = f" and {len(names) - _KEYS_SHOWN:,} more" if len(names) > _KEYS_SHOWN else ""
    return f"{', '.join(f'`{shown(name)[1:-1]}`' for name in names[:_KEYS_SHOWN])}{more}"


def _unreadable(
    path: Path, found: str, fix: str = _TAKEN, expected: str = "a UTF-8 text file"
) -> StageError:
    return StageError(f"{path} cannot be read", expected, found, fix)


def _refuse_other_formats(path: Path, known: bytes | None = None) -> None:
    try:
        if path.exists() and not path.is_file():  # reading a pipe twice would wait for ever
            raise _unreadable(path, "a directory" if path.is_dir() else "not a regular file")
        with path.open("rb") as file:
            head = file.read(32)
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        raise _unreadable(path, str(error)) from error
    for start, found, fix in _FORMATS:
        if start != known and head.startswith(start):
            raise _unreadable(path, found, fix)


def _parse(line: str, where: str) -> Any:
    try:
        line.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(line[error.start]) - 0xDC00
        found = f"byte 0x{byte:02x} at column {error.start + 1}"
        raise StageError(f"{where} is not UTF-8", "UTF-8 text", found, _FIX) from error
    try:
        row = parse_json(line, _constant)
    except json.JSONDecodeError as error:
        found = f"{error.msg} at column {error.colno}: {line.strip()[:60]!r}"
        if "\0" in line:
            found = f"NUL bytes: {line.strip()[:60]!r}"
    except ValueError as error:  # a key twice, deep nesting, or an integer of over 4,300 digits
        found = str(error)
    else:
        if row is None:
            raise StageError(f"{where} is not a conversation", SHAPE, "null", _FIX)
        return row
    raise StageError(f"{where} is not JSON", f"one row per line: {SHAPE}", found, _FIX)


def _constant(name: str) -> float | None:
    return None if name == "NaN" else float(name)
