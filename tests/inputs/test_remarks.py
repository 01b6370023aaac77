"""What of the rows is not trained on is told by every stage that reads them, once, in its log."""

import json

import pytest

from sparselong.config import load
from sparselong.data import Usable, encode_files, select_usable
from sparselong.errors import StageError
from sparselong.evaluate.stage import choose_rows
from sparselong.finetune import trainer
from sparselong.model import load_tokenizer
from sparselong.run import Stage
from tests.conftest import ROOT


def turns(*thoughts: str) -> list[dict]:
    said = []
    for thought in thoughts:
        answer = {"role": "assistant", "content": "Yes."}
        said += [{"role": "user", "content": "One?"}, answer | {"thinking": thought}]
    return said


ROW = {"messages": turns("First.", "Second.", "Third."), "topic": "numbers"}
DEMO = "evaluation.tasks=[demo_hellaswag]"
TOLD = (
    "train: 4 of 5 conversations nearly repeat earlier ones",
    "warning: validation: 1 of 1 conversations nearly repeat training conversations, which",
    "rows.jsonl: blank lines skipped: 2",
    "rows.jsonl: keys without meaning for training are ignored: topic (6 rows)",
    "train: the chat template leaves out the thinking of 10 turns, in 5 of 5 conversations",
    "validation: the chat template leaves out the thinking of 2 turns, in 1 of 1 conversations",
)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n" + f"{json.dumps(ROW)}\n" * 6, encoding="utf-8")
    return path


def test_stages_01_and_02_tell_it_once(base, rows, tmp_path, run_script):
    more = (f"model.base={base}", f"data.train={rows}", "sequence_len=256", DEMO)
    assert run_script("01_health", *more).code == 0
    report = json.loads((tmp_path / "run/01_health/report.json").read_text())
    (row,) = [row for row in report["rows"] if row["check"] == "conversations"]
    assert row["status"] == "warn" and "data.validation=FILE" in row["fix"]
    found = row["found"]
    assert "5 training and 1 validation conversations" in found
    done = run_script("02_compress", *more)
    assert done.code == 0, done.err
    assert done.err.count("5 training and 1 validation conversations\n") == 1
    log = (tmp_path / "run/02_compress/log.txt").read_text(encoding="utf-8")
    for text in TOLD:
        assert found.count(text) == log.count(text) == done.err.count(text) == 1, (found, log)


@pytest.fixture
def finetune(untrained_base, rows, tmp_path, monkeypatch):
    """Return a function that runs stage 03 without its training, and returns the stage."""
    monkeypatch.setattr(trainer, "load_tokenizer", lambda _: load_tokenizer(untrained_base))
    for name in ("_train", "_publish"):
        monkeypatch.setattr(trainer, name, lambda _: None)

    def run(*overrides: str) -> Stage:
        given = [f"data.train={rows}", "sequence_len=256", *overrides]
        stage = Stage("03_finetune", load(ROOT / "configs/tiny.yaml", given), tmp_path / "run")
        stage.dir.mkdir(parents=True, exist_ok=True)
        encode_files(stage.config, stage.run_dir, load_tokenizer(untrained_base))
        trainer.finetune(stage)
        return stage

    return run


def test_stage_03_tells_it_of_rows_that_an_earlier_stage_encoded(finetune):
    stage = finetune()
    log = (stage.dir / "log.txt").read_text(encoding="utf-8")
    assert [log.count(text) for text in TOLD] == [1] * len(TOLD), log
    assert "validation: 1 conversations, " in log
    assert len(stage.metrics["remarks"]) == len(TOLD)
    (warning,) = stage.metrics["warnings"]
    assert "not compared yet with the items of demo_hellaswag; 04_eval compares" in warning


def test_evaluation_items_in_the_rows_are_reported_before_training(finetune, rows, monkeypatch):
    counted = " ".join(map(str, range(20)))
    rows.write_text(f'{{"text": "{counted}"}}\n' * 3, encoding="utf-8")
    read = {"items": {"gsm8k": [f"Count to {counted}"]}, "missing": {}}
    monkeypatch.setattr("sparselong.data.overlap.training._read_others", lambda *_: read)
    logged = []
    monkeypatch.setattr(trainer, "_train", lambda s: logged.append((s.dir / "log.txt").read_text()))
    (warning,) = finetune("evaluation.tasks=[gsm8k]").metrics["warnings"]
    assert warning.startswith("1 of the 1 items of gsm8k share 13 consecutive words")
    assert f"warning: {warning}\n" in logged[0]
    with pytest.raises(StageError, match="ruler_vt cannot be made for a context of 300"):
        finetune("evaluation.tasks=[ruler_vt]", "evaluation.ruler.lengths=[2048,300]")
    assert len(logged) == 1


@pytest.mark.parametrize(
    ("asked", "told"), [(1, []), (2, []), (3, ["2 validation", "the 3 asked"])]
)
def test_stage_04_says_if_there_are_fewer_rows_than_asked_for(tmp_path, asked, told):
    config = load(ROOT / "configs/tiny.yaml", [f"evaluation.perplexity_samples={asked}"])
    stage = Stage("04_eval", config, tmp_path / "run")
    stage.dir.mkdir(parents=True)
    assert choose_rows(stage, Usable([0], [4, 7], [])) == [4, 7][:asked]
    log = stage.dir / "log.txt"
    text = log.read_text() if log.exists() else ""
    assert bool(text) == bool(told) and all(each in text for each in told)


def test_nothing_is_told_of_rows_that_are_used_whole(untrained_base, rows, tmp_path):
    lines = [json.dumps({"messages": turns(f"Only {n}.")}) for n in range(4)]
    rows.write_text("\n".join(lines), encoding="utf-8")
    config = load(ROOT / "configs/tiny.yaml", [f"data.train={rows}", "sequence_len=256"])
    tokenizer = load_tokenizer(untrained_base)
    assert select_usable(encode_files(config, tmp_path / "run", tokenizer), 128).left_out == []
