"""What benchmarks/compress_rate.py reads from finished runs, and its section of BENCHMARKS.md."""

import json
import shutil

import pytest

from benchmarks import compress_rate, record
from benchmarks.report import compress_rate as section
from sparselong.config import load


@pytest.fixture
def case() -> dict:
    return {"shape": "tiny", "layers": 4, "samples": 8, "sequence_len": 64}


def test_rows_are_those_of_the_records(
    compressed_run, small_arguments, case, tmp_path, monkeypatch
):
    rows, median = compress_rate.layer_rows(case, compressed_run)
    per_layer = len(compress_rate.COMPUTED) + len(compress_rate.BESIDE) + 1
    assert len(rows) == 4 * per_layer
    metrics = json.loads((compressed_run / "02_compress/manifest.json").read_text())["metrics"]
    for part in compress_rate.COMPUTED:
        total = sum(row["value"] for row in rows if row["metric"] == f"{part}_seconds")
        assert total == pytest.approx(metrics["seconds_by_part"][part], abs=1e-3)
    totals = [row["value"] for row in rows if row["metric"] == "layer_seconds"]
    assert median == sorted(totals[1:])[1] > 0
    config = load(small_arguments[1], small_arguments[2:])
    rows += compress_rate.run_rows(case, config, compressed_run, 12.5)
    rows.append(record.row(case, "sparselong", "median_layer_seconds", median, "s"))
    record.write("compress_rate_tiny", "here", "command", rows, tmp_path)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    text = section.write_section()
    assert f"| tiny | {median:.2f} s |" in text and "| tiny | 4 | 12 s |" in text


def test_a_file_that_differs_is_found(compressed_run, tmp_path):
    again = shutil.copytree(compressed_run / "02_compress", tmp_path / "again/02_compress").parent
    equal, different = compress_rate.compare(compressed_run, again)
    assert equal >= 12 and different == []
    path = again / "02_compress/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["outputs"][3]["sha256"] = "0" * 64
    gone = manifest["outputs"].pop()
    path.write_text(json.dumps(manifest))
    expected = sorted([manifest["outputs"][3]["path"], gone["path"]])
    assert compress_rate.compare(compressed_run, again) == (equal - 2, expected)


def test_calibration_gets_as_many_tokens_as_it_asks_for(tmp_path):
    compress_rate.write_data(tmp_path / "data.jsonl", samples=16, length=64)
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    assert all(len(row["input_ids"]) == 64 and row["labels"] == row["input_ids"] for row in rows)
    assert len(rows) * 0.95 >= 16  # some are held out
