"""The user's function: what it may return, and how its failures are told."""

import math

import numpy
import pytest

from sparselong.errors import StageError
from sparselong.finetune.watching import MetricFunction

IDS = numpy.array([1, 2, 3, 4]), numpy.array([1, 2, 0, 0])


def write(folder, text: str, name: str = "f") -> str:
    (folder / "my_metrics.py").write_text(text)
    return f"{folder / 'my_metrics.py'}:{name}"


@pytest.mark.parametrize(
    ("body", "figures"),
    [
        ("(predictions == labels).mean()", {"f": 0.5}),
        ("float((predictions == labels).mean())", {"f": 0.5}),
        ("{'right': (predictions == labels).sum(), 'all': len(labels)}", {"right": 2, "all": 4}),
        ("{'a': float('nan'), 'b': float('inf')}", {"a": None, "b": None}),
        ("{'a': 10**400, 'b': 10**20}", {"a": None, "b": 10**20}),
    ],
)
def test_it_returns_a_number_or_several(tmp_path, body, figures):
    place = write(tmp_path, f"def f(predictions, labels):\n    return {body}\n")
    found = MetricFunction(place)(*IDS)
    assert found == figures
    assert all(value is None or math.isfinite(value) for value in found.values())


def test_its_file_may_define_what_python_looks_up_by_module(tmp_path):
    head = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    text = f"{head}@dataclass\nclass Mean:\n    of: int\ndef f(predictions, labels):\n"
    found = MetricFunction(write(tmp_path, f"{text}    return Mean(2).of\n"))(*IDS)
    assert found == {"f": 2}


@pytest.mark.parametrize(
    "body", [*("None", "'0.5'", "[0.5]", "{'a': 'b'}", "{1: 2.0}", "1j"), "{}", "{'': 1}"]
)
def test_anything_else_is_refused(tmp_path, body):
    function = MetricFunction(write(tmp_path, f"def f(predictions, labels):\n    return {body}\n"))
    with pytest.raises(StageError, match=r"f of .*my_metrics\.py returned no figures"):
        function(*IDS)


def test_a_failure_in_it_names_file_and_line(tmp_path):
    text = "def f(predictions, labels):\n    return g(labels)\n\ndef g(x):\n    return 1 / int(0)\n"
    function = MetricFunction(write(tmp_path, text))
    with pytest.raises(StageError) as failed:
        function(*IDS)
    assert (
        failed.value.what == f"training.metrics: {tmp_path / 'my_metrics.py'} failed in f, line 5"
    )
    assert failed.value.found == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("text", "line", "found"),
    [
        ("import os\nimport no_such_module_xyz\n", 2, "ModuleNotFoundError"),
        ("x = 1\ndef f(:\n", 2, "SyntaxError"),
        ("\n\nraise ValueError('not today')\n", 3, "ValueError: not today"),
        ("import sys\nsys.exit(0)\n", 2, "SystemExit: 0"),  # a script without a guard
    ],
)
def test_a_file_that_cannot_be_run_is_refused_with_its_line(tmp_path, text, line, found):
    with pytest.raises(StageError, match=f"cannot be run, line {line}\n") as refused:
        MetricFunction(write(tmp_path, text))
    assert refused.value.found.startswith(found)


def test_an_exit_in_it_is_a_failure(tmp_path):
    function = MetricFunction(
        write(tmp_path, "def f(predictions, labels):\n    raise SystemExit\n")
    )
    with pytest.raises(StageError, match="failed in f, line 2"):
        function(*IDS)


@pytest.mark.parametrize("taken", ["labels", "a, b, c", "a, *, b", ""])
def test_a_function_that_takes_something_else_is_refused_at_once(tmp_path, taken):
    with pytest.raises(StageError, match=r"my_metrics\.py has f with other arguments\n"):
        MetricFunction(write(tmp_path, f"def f({taken}):\n    return 0\n"))


@pytest.mark.parametrize("name", ["g", "constant"])
def test_a_function_that_is_not_there_is_refused(tmp_path, name):
    place = write(tmp_path, "def f(predictions, labels):\n    return 0\nconstant = 3\n", name)
    with pytest.raises(StageError, match=rf"my_metrics\.py has no function {name}"):
        MetricFunction(place)


def test_a_file_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StageError, match="not there") as refused:
        MetricFunction("absent.py:f")
    assert refused.value.found == str(tmp_path / "absent.py")
