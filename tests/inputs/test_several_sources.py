"""Several sources of different layouts through the scripts: told, recorded, refused if changed."""

import json

import pyarrow
from pyarrow import parquet

DEMO = "evaluation.tasks=[demo_hellaswag]"


def test_several_sources_through_the_scripts(base, data, tmp_path, run_script):
    numbers = [f"{n} and {n + 1} and {n + 2}" for n in range(40)]
    lines = data([{"text": text} for text in numbers], "texts.jsonl")
    cells = "".join(f"Count from {n}.,{text}\n" for n, text in enumerate(numbers))
    table = tmp_path / "alpaca.csv"
    table.write_text(f"instruction,output\n{cells}")
    turns = [
        {"conversations": [{"from": "human", "value": "?" * n}, {"from": "gpt", "value": text}]}
        for n, text in enumerate(numbers, 1)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(turns), tmp_path / "turns.parquet")
    shares = [
        {"source": str(path), "weight": weight}
        for path, weight in ((lines, 1), (table, 1), (tmp_path / "turns.parquet", 2))
    ]
    more = (f"model.base={base}", f"data.train={json.dumps(shares)}", "sequence_len=256", DEMO)
    planned = json.loads(run_script("02_compress", *more, "--dry-run", "--json").out)
    read = {row["path"] for row in planned["reads"]}
    assert {share["source"] for share in shares} <= read
    assert run_script("01_health", *more).code == 0
    report = json.loads((tmp_path / "run/01_health/report.json").read_text())
    found = [row["found"] for row in report["rows"] if row["check"] == "training data"]
    assert len(found) == 3 and all("file of" in text for text in found)
    done = run_script("02_compress", *more)
    assert done.code == 0, done.err
    assert "turns.parquet: 57 training examples (50.0%)" in done.err
    assert "texts.jsonl: rows of `text` or `input_ids`" in done.err
    manifest = json.loads((tmp_path / "run/02_compress/manifest.json").read_text())
    assert [*manifest["sources"]] == [f"data.train[{i}].source" for i in range(3)]
    table.write_text(f"instruction,output\n{cells}More.,more\n")
    run_script("02_compress", *more).assert_explained("alpaca.csv", "changed")
