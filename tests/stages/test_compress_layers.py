"""02_compress --layers: some of the layers in a command, the rest in the next."""

import json
from pathlib import Path

import pytest

from benchmarks.compress_rate import BESIDE, COMPUTED
from tests.stages.conftest import run
from tests.stages.test_compress_interrupted import assert_same_result


def test_layers_of_several_commands_are_those_of_one(
    compressed_run, small_arguments, tmp_path, capsys
):
    run_dir = tmp_path / "run"
    done = []
    for words in (["--layers", "0:1"], ["--layers", "0:3"], ["--layers", "2:3"]):
        assert run(run_dir, small_arguments, *words, "--json") == 0
        shown = capsys.readouterr()
        assert "page" not in shown.err
        document = json.loads(shown.out)
        assert document["status"] == "unfinished" and document["metrics"]["layers"] == 4
        done.append(document["metrics"]["layers_done"])
        assert not (run_dir / "02_compress/manifest.json").exists()
    assert done == [1, 3, 3]
    assert run(run_dir, small_arguments, "--layers", "3:4", "--json") == 0
    assert json.loads(capsys.readouterr().out)["status"] == "done"
    assert_same_result(run_dir, compressed_run)
    metrics = json.loads((run_dir / "02_compress/manifest.json").read_text())["metrics"]
    assert len(metrics["relative_error"]) == 4
    parts = metrics["seconds_by_part"]
    assert set(parts) == {*COMPUTED, *BESIDE}  # a layer's time in benchmarks is the sum of these
    assert all(parts[name] > 0 for name in ("read", "write", "hash", "solve"))
    assert run(run_dir, small_arguments, "--layers", "0:1") == 0
    assert "up to date" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", ["3", "a:b", "2:2", "3:1", "-1:2", "1:", ":2", "0:2:4", "0.5:2", "²:3"]
)
def test_what_names_no_layers_is_refused(small_arguments, tmp_path, capsys, words):
    assert run(tmp_path / "run", small_arguments, f"--layers={words}") == 2
    shown = capsys.readouterr().err
    for line in ("error:    --layers does not name layers", "expected: A:B", f"--layers {words}"):
        assert line in shown
    assert "fix:      leave it out" in shown
    assert not (tmp_path / "run").exists()


def test_force_does_not_remove_layers_that_the_command_would_not_make_again(
    compressed_run, small_arguments, tmp_path, capsys
):
    run_dir = tmp_path / "run"
    assert run(run_dir, small_arguments, "--layers", "0:2") == 0
    assert run(run_dir, small_arguments, "--layers", "2:4", "--force") == 2
    shown = capsys.readouterr().err
    assert "--layers that begins at 0" in shown and "leave out --force to continue" in shown
    assert len(list((run_dir / "02_compress/work").glob("layer-*.json"))) == 2
    assert run(run_dir, small_arguments, "--layers", "0:1", "--force") == 0
    assert run(run_dir, small_arguments) == 0
    assert_same_result(run_dir, compressed_run)


def test_layers_that_the_model_lacks_are_refused(small_arguments, tmp_path, capsys):
    assert run(tmp_path / "run", small_arguments, "--layers", "2:5") == 2
    shown = capsys.readouterr().err
    assert "B up to 4" in shown and "--layers 2:5" in shown and "pass --layers 2:4" in shown


def test_layers_after_unfinished_ones_are_refused(small_arguments, tmp_path, capsys):
    assert run(tmp_path / "run", small_arguments, "--layers", "1:2") == 2
    shown = capsys.readouterr().err
    assert "at most 0, the number of finished layers" in shown and "--layers 0:2" in shown
    assert not list(Path(tmp_path / "run/02_compress/work").glob("layer-*.json"))
