"""Benchmarks whose layers keep what the planner decides. Nothing is measured here."""

import sys
from typing import Any

import pytest

from benchmarks import memory, old_and_new, shape_20b, train_step
from benchmarks.report.train_step import planned_lines
from sparselong.memory import MARGIN, Kept

CARD = 24 * 2**30
PLANNED = ["--arms", "masked", "--planned", "--cap-gib", "24"]


def parse(monkeypatch, *given: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["train_step.py", *given])
    return train_step.parse()


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ([], "never"),
        (["--keep-experts", "always"], "always"),
        (["--keep-experts", "4"], 4),
        (PLANNED, "auto"),
        ([*PLANNED, "--keep-experts", "never"], "never"),
    ],
)
def test_a_step_keeps_all_none_some_or_what_the_planner_decides(monkeypatch, given, asked):
    assert parse(monkeypatch, *given).keep_experts == asked


@pytest.mark.parametrize(
    ("given", "allowed"),
    [
        (["--keep-experts", "auto"], "always, never, 0 to 24"),
        (["--keep-experts", "25"], "always, never, 0 to 24"),
        (["--keep-experts", "-1"], "always, never, 0 to 24"),
        ([*PLANNED, "--keep-experts", "4"], "auto, always, never"),
    ],
)
def test_other_words_are_refused_before_measuring(monkeypatch, capsys, given, allowed):
    with pytest.raises(SystemExit):
        parse(monkeypatch, *given)
    assert f"allowed here: {allowed}\n" in capsys.readouterr().err


@pytest.mark.parametrize("tokens", [8192, 16384])
def test_the_planner_decides_how_many_layers_keep_their_experts(monkeypatch, tokens):
    args, (predicted,) = train_step.planned(parse(monkeypatch, *PLANNED), tokens)
    layers = args.keep_experts
    assert 1 < layers < 24 and args.keep_attention == "always"
    case = train_step.describe(args, tokens)
    assert memory.kept_in(case) == Kept(True, layers)
    assert predicted["value"] * MARGIN <= CARD
    more = memory.predict(case | {"keep_experts": layers + 1}).peak_bytes
    assert more * MARGIN > CARD and more > predicted["value"]
    found = [{"case": case, "metric": "out_of_memory", "value": 1}, predicted]
    (shown,) = planned_lines({"rows": found, "file": ""})[1:-1]
    assert f"experts kept in {layers} layers" in shown


def test_older_results_say_always_or_never():
    case = memory.DEFAULTS | {"layers": 12}
    asked = ("always", "never", 5)
    assert [memory.kept_in(case | {"keep_experts": each}).experts for each in asked] == [12, 0, 5]
    del case["keep_experts"]
    assert memory.kept_in(case).experts == 0


@pytest.mark.parametrize(
    ("decided", "kept"),
    [
        ({"keep_experts": 3}, Kept(True, 3)),
        ({"keep_experts": "always"}, Kept(True, 24)),  # as an older checkout answers
        ({"keep_experts": "never"}, Kept(True, 0)),
        ({"keep_experts": 0, "offload": True}, Kept()),
        ({"keep_experts": 0, "slice_rows": "8192"}, Kept()),
    ],
)
def test_compared_checkouts_keep_what_each_ones_planner_decides(monkeypatch, decided, kept):
    given = []

    def settle(case: dict[str, Any], cap_bytes: int) -> dict[str, Any]:
        assert (case["tokens"], case["layers"], cap_bytes) == (16384, 24, CARD)
        whole = {"slice_rows": "never", "offload": False, "keep_attention": "always"}
        return whole | decided

    class Model:
        def get_base_model(self) -> str:
            return "base"

    monkeypatch.setattr(memory, "settle", settle)
    monkeypatch.setattr(shape_20b, "compute_layers", lambda *what: given.append(what))
    worker = old_and_new.Measured()
    worker.model, worker.layers, worker.cap_bytes = Model(), 24, CARD
    assert worker._keep_as_planned(16384) == kept.experts
    assert given == [("base", kept)]
