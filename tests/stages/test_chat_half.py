"""06_chat.py on half a run, or on the run of another config: what opens, and what is told."""

import json
import shutil

import pytest

from tests.conftest import load_script

chat = load_script("06_chat").main
ASK = ["--prompt", "Hi", "--max-new-tokens", "2", "--context", "200", "--seed", "1", "--json"]


@pytest.fixture
def half(compressed_run, tmp_path):
    """A copy of a run with stage 02 done, which the test may damage."""
    return shutil.copytree(compressed_run, tmp_path / "run", symlinks=True)


@pytest.fixture
def ask(small_arguments, capsys):
    """Return the exit code for a model of a run, and the document that was printed."""

    def run(run_dir, model, *more):
        capsys.readouterr()
        code = chat([*small_arguments, "--run-dir", str(run_dir), "--model", model, *ASK, *more])
        return code, json.loads(capsys.readouterr().out)

    return run


def error_of(found):
    code, document = found
    assert code == 1 and document["status"] == "failed"
    return document


def test_with_stage_02_alone_its_model_and_the_base_open(half, ask):
    for model in ("base", "compressed"):
        code, document = ask(half, model)
        assert (code, document["model"]) == (0, f"run/{model}")
        assert document["usage"]["new_tokens"] > 0
    told = error_of(ask(half, "finetuned"))
    assert "needs 03_finetune, which is not done" in told["what"]
    assert told["fix"].startswith("run python 03_finetune.py --config ")


def test_an_unfinished_stage_03_is_not_opened(half, ask):
    """Not even what it has baked already: its manifest comes last."""
    shutil.copytree(half / "02_compress/model", half / "03_finetune/model")
    (half / "03_finetune/checkpoints").mkdir()
    told = error_of(ask(half, "finetuned"))
    assert "needs 03_finetune, which is not done" in told["what"]
    assert ask(half, "compressed")[0] == 0


def test_an_unfinished_stage_02_is_not_opened(half, ask):
    (half / "02_compress/manifest.json").unlink()
    for model in ("compressed", "finetuned"):
        told = error_of(ask(half, model))
        assert "needs 02_compress, which is not done" in told["what"]
        assert told["fix"].startswith("run python 02_compress.py")
    assert ask(half, "base")[0] == 0


def test_the_run_of_another_config_is_refused_by_key(half, ask):
    told = error_of(ask(half, "compressed", "shared_dense.weight_bits=8"))
    assert "02_compress" in told["what"] and "another config" in told["what"]
    assert "shared_dense.weight_bits" in told["expected"] + told["found"]
    assert "pass what it was made with" in told["fix"]


def test_a_model_that_was_changed_since_is_named(half, ask):
    path = half / "02_compress/model/config.json"
    path.write_text(path.read_text() + "\n")
    assert "config.json" in str(error_of(ask(half, "compressed")))
    shutil.rmtree(path.parent)
    assert "02_compress" in str(error_of(ask(half, "compressed")))


def test_no_model_of_the_run_is_a_usage_error(half, ask):
    code, document = ask(half, "finetune")
    assert code == 2 and "base, compressed, finetuned, or" in document["expected"]
