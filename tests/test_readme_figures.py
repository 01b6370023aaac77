"""Every figure of README.md comes from a result file, from the planner, or from a named source.

tests/readme_figures.json maps each figure, as README prints it, to its source (in the forms of
benchmarks/report/figures.py). `near` is text from the same paragraph, for figures that occur more
than once. `given` instead of `from` cites the source of a figure that is not measured here.
"""

import json
import re

import pytest

from benchmarks.report import figures, promises
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
TIES = json.loads((ROOT / "tests/readme_figures.json").read_text(encoding="utf-8"))
PROMISES = promises.read_promises()


def readable_lines(text: str) -> list[str]:
    """Return README's paragraphs, table rows and transcripts, one line each.

    Omits commands, code and links. The promises' remarks are added; their other columns have their
    own sources.
    """
    remarks = [
        "- " + " ".join(e.get(key, "") for key in ("what", "not_run", "why")) for e in PROMISES
    ]
    lines, block = [""], None
    for line in [*text.splitlines(), "", *remarks]:
        if line.startswith("```"):
            block = None if block is not None else line[3:]
            lines.append("")
        elif block == "text" or block is None and (not lines[-1] or line[:1] in ("", *"-|#!<")):
            lines.append(line)
        elif block is None:
            lines[-1] += " " + line.strip()
    return [re.sub(r"`[^`]*`|\[[\w-]+\.json\]|\]\([^)]*\)", "", line) for line in lines]


def find_ties(figure: str, line: str) -> list[dict]:
    return [tie for tie in TIES if tie["figure"] == figure and tie.get("near", "") in line]


FOUND = [
    (match.group(), line) for line in readable_lines(README) for match in figures.find_figures(line)
]


def test_every_readme_figure_has_a_source():
    assert len(FOUND) > 80
    assert [(f, line) for f, line in FOUND if len(find_ties(f, line)) != 1] == []


def test_every_tie_is_used():
    used = [tie for figure, line in FOUND for tie in find_ties(figure, line)]
    assert [tie for tie in TIES if tie not in used] == []


@pytest.mark.parametrize("tie", TIES, ids=lambda tie: f"{tie['figure']} {tie.get('near', '')}")
def test_a_figure_equals_its_source(tie):
    if "given" in tie:
        assert "from" not in tie and len(tie["given"].split()) > 2
        return
    match = figures.FIGURE.fullmatch(tie["figure"])
    assert match
    value = figures.look_up(tie["from"], match["unit"] or "")
    assert figures.is_shown(match["number"], value), value


@pytest.mark.parametrize("entry", PROMISES, ids=lambda entry: entry["promise"])
def test_a_promise_matches_its_source(entry):
    assert entry["design"] in "ABCDE" and {"value", "unit"} == entry["promised"].keys()
    assert "ours" in entry or "not_run" in entry
    if "ours" in entry:
        ours = entry["ours"]
        value = figures.look_up(ours["from"], ours["unit"])
        assert figures.is_shown(str(ours["value"]), value), value
        assert entry["machine"] == figures.name_machine(ours["from"])


def test_every_figure_in_the_designs_is_among_the_promises():
    promised = {(e["design"], str(e["promised"]["value"])) for e in PROMISES}
    assert promised >= {
        *(("A", v) for v in ("38", "24", "14", "20", "16384", "3674", "5022", "6455", "1.76", "5")),
        *(("C", v) for v in ("[8, 64]", "[14, 16]", "44", "8192")),
        *(("D", v) for v in ("2.5", "16000")),
        *(("E", v) for v in ("24", "14.7", "16.3", "[15, 16]")),
    }


def test_a_missing_or_ambiguous_row_is_detected():
    row = {"file": "generation-h200-20261121.json", "case": {}, "metric": "throughput"}
    with pytest.raises(ValueError, match="3 rows match"):
        figures.find_row(row)
    with pytest.raises(ValueError, match="0 rows match"):
        figures.find_row(row | {"backend": "gone"})


@pytest.mark.parametrize("text, value, shown", [
    ("18,706", 18706.3, True),
    ("18,706", 18706.6, False),
    ("0.80", 0.8039, True),
    ("0.80", 0.8061, False),
    ("43", 42.79, True),
    ("2.4", 2.47, False),
])  # fmt: skip
def test_a_figure_must_be_the_value_rounded_as_printed(text, value, shown):
    assert figures.is_shown(text, value) is shown


def test_figures_are_found_with_and_without_units():
    found = [m.group() for m in figures.find_figures("1,859 tokens/s, 12.3 GiB; 4 cards, 43% of 7")]
    assert found == ["1,859 tokens/s", "12.3 GiB", "43%"]
