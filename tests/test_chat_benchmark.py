"""benchmarks/chat.py on a small model, and the section that is made from its result."""

import json
import sys

import pytest
import torch

from benchmarks import chat as benchmark
from benchmarks import record
from benchmarks.report import chat as section

SMALL = {"layers": 2, "prompt": 160, "tokens": 8, "prefix": 320, "repeats": 1}


@pytest.fixture(scope="module")
def result(tmp_path_factory, forked_python):
    folder = tmp_path_factory.mktemp("results")
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    with pytest.MonkeyPatch.context() as patched:
        names = ["chat.py", "--widths=tiny", *options, "--machine=cpu", f"--folder={folder}"]
        patched.setattr(sys, "argv", names)
        patched.setattr(sys, "executable", forked_python)  # of the client
        benchmark.main()
    (path,) = folder.iterdir()
    return json.loads(path.read_text())


def test_every_arm_is_measured_over_http_and_in_the_process(result):
    values = {(row["backend"], row["metric"]): row["value"] for row in result["rows"]}
    for backend in ("generate", "whole", "stream"):
        for metric in ("throughput", "sampled_throughput", "first_token_seconds"):
            assert values[backend, metric] > 0
    assert values["whole", "turn_first_token_seconds"] > 0
    # What a turn reads is what `--prompt` asks for, and not its prefix.
    assert SMALL["prompt"] <= values["whole", "tokens_to_read"] < SMALL["prefix"]


def test_the_section_compares_with_generate(result, monkeypatch):
    for entry in result["rows"]:
        entry["case"]["widths"] = "20b"
        if entry["metric"] == "throughput":
            entry["value"] = {"generate": 800.0, "whole": 784.0, "stream": 760.0}[entry["backend"]]
    found = {"h200": result | {"file": "chat-h200-20261128.json"}}
    monkeypatch.setattr(section, "newest", lambda subject: found)
    text = section.write_section()
    assert "| whole | 784 | 98.0% |" in text and "| stream | 760 | 95.0% |" in text
    assert "after a prefix of 320 tokens" in text
    result["rows"][0]["case"]["widths"] = "tiny"
    assert section.write_section() == ""


def test_what_is_beyond_its_limit_is_told(monkeypatch, tmp_path):
    names = [f"{backend}{kind}" for backend in ("generate", "whole", "stream")
             for kind in ("", " sampled")]  # fmt: skip
    arms = {name: {"first_token_seconds": 1.0, "throughput": 100.0} for name in names}
    arms["stream"]["throughput"], arms["whole sampled"]["throughput"] = 94.0, 86.0
    turns = {"turn_first_token_seconds": 1.4, "tail_first_token_seconds": 1.0, "tokens_to_read": 9}
    monkeypatch.setattr(benchmark, "open_engine", lambda *_: None)
    monkeypatch.setattr(benchmark, "serving", lambda _: pytest.MonkeyPatch.context())
    monkeypatch.setattr(benchmark, "asking", lambda _: pytest.MonkeyPatch.context())
    monkeypatch.setattr(benchmark, "time_arms", lambda *_: arms)
    monkeypatch.setattr(benchmark, "time_turns", lambda *_: turns)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = benchmark.argparse.Namespace(widths="20b", **SMALL)
    rows, beyond = benchmark.measure(options, tmp_path)
    assert [text.split(":")[0] for text in beyond[:1]] == ["stream"] and "1.40 times" in beyond[1]
    assert len(beyond) == 2 and len(rows) == 13
    assert all(set(row) == set(record.row({}, "", "", 0.0, "")) for row in rows)
