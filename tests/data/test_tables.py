"""Parquet and CSV files: the same conversations as in JSON lines, and refusals with their place."""

import csv
import json

import pyarrow
import pytest
from pyarrow import parquet

from sparselong.config import load
from sparselong.data import conversations
from sparselong.errors import StageError
from tests.conftest import ROOT, write_rows

ASK, ANSWER = {"role": "user", "content": "Größe?\n"}, {"role": "assistant", "content": "1, 2"}
FUNCTION = {"name": "f", "arguments": '{"a": null}'}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": FUNCTION}]}
ROWS = [
    {"messages": [ASK, ANSWER], "tools": None, "weight": 1, "id": "x"},
    {"messages": [ASK, {**ANSWER, "thinking": "Hm."}], "tools": None, "weight": None, "id": None},
    {"messages": [ASK, CALL], "tools": '[{"name": "f"}]', "weight": 1.0, "id": "y"},
]


def write_parquet(path, rows):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_csv(path, rows, encoding="utf-8"):
    with path.open("w", encoding=encoding, newline="") as file:
        out = csv.writer(file)
        out.writerow(rows[0])
        for row in rows:
            values = row.values()
            out.writerow(v if isinstance(v, str) or v is None else json.dumps(v) for v in values)
    return path


def without_origin(rows):
    return [{key: row[key] for key in row if key != "origin"} for row in rows]


@pytest.mark.parametrize("write", [write_parquet, write_csv], ids=["parquet", "csv"])
def test_tables_hold_the_same_conversations_as_lines(tmp_path, write):
    lines = conversations.read(write_rows(tmp_path / "rows.jsonl", ROWS))
    path = write(tmp_path / f"rows.{write.__name__.removeprefix('write_').upper()}", ROWS)
    table = conversations.read(path)
    assert without_origin(table) == without_origin(lines)
    places = (
        ["row 1", "row 2", "row 3"] if write is write_parquet else ["line 2", "line 4", "line 6"]
    )
    # Line breaks in JSON cells are escaped, so that a CSV row has one line.
    unit, first = ("row", 1) if write is write_parquet else ("line", 2)
    places = [f"{unit} {number}" for number in range(first, first + 3)]
    assert [conversations.locate(row) for row in table] == [f"{path}, {p}" for p in places]
    assert conversations.read_line(path, first + 1) == table[1]


def test_rows_of_tables_are_prepared_and_read_again(tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", ROWS * 4)
    files = conversations.prepare(
        load(ROOT / "configs/tiny.yaml", [f"data.train={path}"]), tmp_path / "run"
    )
    rows = [row for file in files for row in conversations.read(file)]
    assert sorted(row["origin"]["row"] for row in rows) == [*range(1, 13)]
    said, *repeated = conversations.read_remarks(tmp_path / "run")
    assert "id (8 rows)" in said and len(repeated) == 2


def test_csv_cells_hold_long_texts_with_line_breaks(tmp_path):
    text = 'a "quoted" line,\n' * 20_000
    rows = [{"instruction": "Copy.", "output": text}, {"instruction": "More.", "output": "x"}]
    limit = csv.field_size_limit()
    path = write_csv(tmp_path / "rows.csv", rows, "utf-8-sig")
    first, second = conversations.read(path)
    assert csv.field_size_limit() == limit
    assert first["messages"][1]["content"] == text
    assert second["origin"] == {"source": str(path), "line": 20_003}
    inside = "line 3 is inside the row that begins in line 2"
    with pytest.raises(StageError, match=rf"(?s){inside}.*name line 2"):
        conversations.read_line(path, 3)
    path.write_text('text\n"a\nb"\n\nc\n"d\ne"\n')  # also of the last row, and a blank line
    for number, what in [
        *((1, "is of the header"), (3, "inside the row that begins in line 2")),
        *((4, "is blank"), (7, "inside the row that begins in line 6"), (8, "has no line 8")),
    ]:
        with pytest.raises(StageError, match=what):
            conversations.read_line(path, number)


@pytest.mark.parametrize(
    ("content", "place", "found"),
    [
        (b"text\na\nb,c\n", "line 3", "2 cells, but 1 columns"),
        (b"text,x\na\n", "line 2", "1 cells, but 2 columns"),
        (b"text,text\na,b\n", "rows.csv", "`text`, `text`"),
        (b"messages\n\"[{'role': 'user'}]\"\n", "line 2", "Expecting property name"),
        (b'text,weight\na,1\nb,"0,5"\n', "line 3", "Extra data"),
        (b"text,weight\na,0.5\n", "line 2", "`weight` 0.5"),
        (b'text\na\n"b"c\n', "line 3", "expected after"),
        (b'text\n"a\n', "line 2", "unexpected end of data"),
        (b"text\na\nGr\xf6\xdfe\n", "rows.csv", "byte 0xf6 on line 3"),
        (b"text\n", "rows.csv is empty", "no lines"),
        (b"", "rows.csv is empty", "no lines"),
        (b"PAR1\x15\x04", "rows.csv", "Parquet"),
        (b"prompt,answer\n1,2\n", "line 2", "`answer`, `prompt`"),
    ],
)
def test_csv_that_cannot_be_read_is_explained(tmp_path, content, place, found):
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(StageError) as raised:
        conversations.read(path)
    assert place in raised.value.what and found in raised.value.found


def test_parquet_that_cannot_be_read_is_explained(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(StageError, match=r"rows\.parquet cannot be read"):
        conversations.read(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(StageError, match="Git LFS pointer"):
        conversations.read(path)
    structs = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    calls = [{**structs, "tool_calls": [{"name": "f", "arguments": {key: 1}}]} for key in "ab"]
    write_parquet(path, [{"messages": [{**ASK, "tool_calls": None}, call]} for call in calls])
    with pytest.raises(StageError, match=r"(?s)rows\.parquet, row 1.*hold null.*JSON text"):
        conversations.read(path)
    write_parquet(path, [{"messages": [ASK, ANSWER]}, {"messages": [ASK]}])
    with pytest.raises(StageError, match=r"rows\.parquet, row 2"):
        conversations.read(path)


@pytest.mark.parametrize("nested", [False, True], ids=["columns", "fields"])
def test_two_columns_of_one_name_are_refused(tmp_path, nested):
    """pyarrow gives the last one, where JSON and CSV with a name twice are refused."""
    path = tmp_path / "rows.parquet"
    one = pyarrow.array(["a"])
    fields = pyarrow.StructArray.from_arrays([one, one], names=["content", "content"])
    columns = [pyarrow.array([["a"]]), fields] if nested else [one, one]
    names = ["x", "messages"] if nested else ["text", "text"]
    parquet.write_table(pyarrow.Table.from_arrays(columns, names=names), path)
    with pytest.raises(StageError) as raised:
        conversations.read(path)
    assert raised.value.found == f"two columns {'messages.content' if nested else 'text'}"


@pytest.mark.parametrize("bad", ["text", "time"])
def test_values_that_python_cannot_hold_are_refused_with_their_row(tmp_path, bad):
    path, none = tmp_path / "rows.parquet", pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0")
    texts = [None, none, pyarrow.py_buffer(b"a\xff" if bad == "text" else b"ab")]
    times = pyarrow.array([0, 10**17 if bad == "time" else 1], pyarrow.timestamp("ms"))
    columns = [pyarrow.Array.from_buffers(pyarrow.string(), 2, texts), times]
    parquet.write_table(pyarrow.Table.from_arrays(columns, names=["text", "time"]), path)
    with pytest.raises(StageError, match=r"rows\.parquet, row 2 cannot be read"):
        conversations.read(path)
