"""Sweeps from the command line to the table, with stages that only pretend."""

import json
from pathlib import Path

import pytest

from sparselong.errors import ConfigError, StageError
from tests.conftest import ROOT, load_script

RANKS = ["--sweep", "lora.r=2,4"]
GRID = ["--sweep", "training.learning_rate=0.001,0.002", "lora.r=2,4"]
NAMES = [f"r={rank},learning_rate={rate}" for rate in ("0.001", "0.002") for rank in (2, 4)]


def started(scripts, stage: str) -> list[str]:
    return [run for name, run in scripts.started if name == stage]


def test_every_combination_runs_once_and_stage_02_is_made_once(sweep, scripts, tmp_path):
    document, text = sweep(*GRID)
    assert started(scripts, "03_finetune") == NAMES
    assert started(scripts, "02_compress") == NAMES[:1]
    folder = tmp_path / "run-sweep"
    made = {path.name for path in folder.iterdir() if path.is_dir()}
    assert made == {*NAMES, "models"}  # links to the finished models
    files = [folder / name / "02_compress/model/dense.safetensors" for name in NAMES]
    assert all(file.samefile(files[0]) for file in files)
    assert {row["name"]: row["values"] for row in document["runs"]} == {
        name: {"training.learning_rate": rate, "lora.r": rank}
        for name, (rate, rank) in zip(
            NAMES, [(0.001, 2), (0.001, 4), (0.002, 2), (0.002, 4)], strict=True
        )
    }
    assert document["status"] == "done" and document["best"] == NAMES[0]
    assert text.splitlines()[0] == (
        "| training.learning_rate | lora.r | status | validation perplexity | at step | of steps "
        "| training loss | trained parameters | tokens/s | peak memory | seconds | GPU hours "
        "| cost |"
    )
    row = "| 0.001 | 2 | done | 12.0010 | 4 | 4 | 2.5000 | 200 | 500 | 1.00 GiB | 0 | 0.50 | 1.75 |"
    assert text.splitlines()[2] == row
    assert text.splitlines()[-1] == f"Lowest validation perplexity: {NAMES[0]}"
    assert (folder / "sweep.md").read_text() == text + "\n"
    assert json.loads((folder / "sweep.json").read_text()) == document
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")

    scripts.started.clear()
    before = {file: file.stat().st_mtime_ns for file in folder.glob("*/0*/manifest.json")}
    assert sweep(*GRID) == (document, text)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert started(scripts, "02_compress") == []


def test_runs_take_the_stage_02_that_the_run_directory_has(sweep, scripts, compressed):
    sweep(*RANKS)
    assert started(scripts, "02_compress") == []
    for name in ("r=2", "r=4"):
        run = compressed.with_name("run-sweep") / name
        file = "02_compress/model/dense.safetensors"
        assert (run / file).samefile(compressed / file)
        for file in ("date.txt", "data/validation.jsonl", "02_compress/manifest.json"):
            assert (run / file).read_bytes() == (compressed / file).read_bytes()
            assert not (run / file).samefile(compressed / file)  # a stage may rewrite it


def test_a_stage_02_that_has_begun_in_a_run_continues_there(sweep, scripts, compressed):
    begun = compressed.with_name("run-sweep") / "r=2/02_compress"
    begun.mkdir(parents=True)
    (begun / "log.txt").write_text("killed at once\n")
    sweep(*RANKS)
    assert started(scripts, "02_compress") == ["r=2"]


def test_a_shared_stage_02_that_was_changed_is_refused(sweep, scripts, compressed):
    (compressed / "02_compress/model/dense.safetensors").write_text("edited")
    with pytest.raises(StageError, match="2 of 2 runs of the sweep failed") as refusal:
        sweep(*RANKS)
    assert "dense.safetensors has changed since 02_compress recorded it" in refusal.value.found
    assert started(scripts, "03_finetune") == []


def test_keys_of_stage_02_get_their_own(sweep, scripts, compressed):
    """The run directory's is of 4 bits. All render the same date, although made on other days."""
    sweep("--sweep", "shared_dense.weight_bits=4,8", "lora.r=2,4")
    assert started(scripts, "02_compress") == ["r=2,weight_bits=8"]
    folder = compressed.with_name("run-sweep")
    found = {}
    for run in folder.glob("r=*"):
        found[run.name] = (run / "02_compress/model/dense.safetensors").read_text()
        assert (run / "date.txt").read_text() == (compressed / "date.txt").read_text()
    assert found == {
        f"r={rank},weight_bits={bits}": f"{bits} bits" for rank in (2, 4) for bits in (4, 8)
    }


def test_a_failed_run_is_reported_and_the_others_go_on(sweep, scripts, tmp_path):
    words = ["--sweep", "training.learning_rate=0.001,5,0.002"]
    with pytest.raises(StageError, match="1 of 3 runs of the sweep failed") as failure:
        sweep(*words)
    assert failure.value.found == "learning_rate=5.0: training diverged at step 1"
    assert started(scripts, "03_finetune")[-1] == "learning_rate=0.002"
    document = failure.value.details["sweep"]
    assert [row["status"] for row in document["runs"]] == ["done", "failed", "done"]
    text = (tmp_path / "run-sweep/sweep.md").read_text()
    assert "| 5.0 | failed |  |" in text and "failed: training diverged at step 1" in text
    with pytest.raises(StageError, match="1 of 3 runs"):
        sweep(*words)


def test_an_interrupted_sweep_goes_on_with_the_run_it_was_in(sweep, scripts, tmp_path, monkeypatch):
    plain = scripts.run

    def interrupt(script: Path, arguments: list[str]):
        scripts.interrupted = "r=4"
        ended = plain(script, arguments)
        if ended.code:
            raise KeyboardInterrupt("SIGTERM")  # the signal reaches the sweep too
        return ended

    monkeypatch.setattr("sparselong.sweep.command.run_script", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sweep("--sweep", "lora.r=2,4,8")
    table = json.loads((tmp_path / "run-sweep/sweep.json").read_text())
    assert table["status"] == "unfinished"
    assert [row["status"] for row in table["runs"]] == ["done", "not finished", "not finished"]
    monkeypatch.setattr("sparselong.sweep.command.run_script", plain)
    scripts.interrupted = ""
    plan, _ = sweep("--sweep", "lora.r=2,4,8", "--dry-run")
    assert [row["status"] for row in plan["runs"]] == ["finished", "unfinished", "new"]
    document, _ = sweep("--sweep", "lora.r=2,4,8")
    assert document["status"] == "done"


def test_a_dry_run_plans_all_runs_and_touches_nothing(sweep, scripts, tmp_path):
    prices = "cost.per_gpu_hour={H200: 3.5, RTX 3090: 0.25}"
    given = ["model.base=openai/gpt-oss-20b", "flash_attention=true", prices]
    plan, text = sweep(*GRID, *given, "--dry-run")
    assert not list(tmp_path.iterdir()) and not scripts.started
    assert [row["name"] for row in plan["runs"]] == NAMES
    assert [row["compressed"] for row in plan["runs"]] == [
        "made",
        *[str(tmp_path / "run-sweep" / NAMES[0])] * 3,
    ]
    hours = [row["estimates"][0]["hours"] for row in plan["runs"]]
    assert hours[0] > hours[1]  # with stage 02
    for number, (gpu, price) in enumerate((("H200", 3.5), ("RTX 3090", 0.25))):
        total, rows = plan["estimates"][number], [row["estimates"][number] for row in plan["runs"]]
        assert total["gpu"] == gpu and total["hours"] == pytest.approx(
            sum(r["hours"] for r in rows)
        )
        assert total["cost"] == pytest.approx(price * total["gpu_hours"])
        assert f"cost {total['cost']:,.2f}" in text
    assert "4 runs in" in text and f"new, stage 02 of {NAMES[0]}, " in text


def test_finished_runs_take_no_more_time(sweep):
    sweep(*RANKS)
    plan, _ = sweep("--sweep", "lora.r=2,4,8", "--dry-run")
    assert [row["status"] for row in plan["runs"]] == ["finished", "finished", "new"]
    hours = [row["estimates"][0]["hours"] for row in plan["runs"]]
    assert hours[:2] == [0, 0] and hours[2] == plan["estimates"][0]["hours"] > 0


def test_other_work_in_a_runs_directory_is_refused_before_the_first_run(sweep, scripts, tmp_path):
    sweep(*RANKS)
    scripts.started.clear()
    with pytest.raises(StageError, match="holds a result of another config") as refusal:
        sweep("--sweep", "lora.r=8,4", "training.max_steps=7")
    assert refusal.value.found == "training.max_steps=60" and not scripts.started
    assert not (tmp_path / "run-sweep/r=8").exists()


def test_two_sweeps_of_one_directory_do_not_run_at_once(sweep, tmp_path):
    from sparselong.run import locked

    with locked(tmp_path / "run-sweep"), pytest.raises(StageError, match="is in use"):
        sweep(*RANKS)


@pytest.mark.parametrize(
    ("key", "note"),
    [
        ("sequence_len=128,256", "Runs differ in sequence_len, which decides"),
        ("seed=1,2", "Runs differ in their validation conversations"),
        ("data.train_on=all,final", "Runs differ in data.train_on, which decides"),
        ("data.date=2026-01-01,2026-01-02", "Runs differ in data.date, which decides"),
        ("model.base=tiny,openai/gpt-oss-20b", "Runs differ in model.base, which decides"),
    ],
)
def test_perplexities_that_do_not_compare_name_no_best_run(sweep, key, note):
    document, text = sweep("--sweep", key)
    assert document["best"] is None and note in text


@pytest.mark.parametrize("word", ["--force", "--preview=3"])
def test_options_that_a_sweep_does_not_take_are_refused(sweep, word):
    with pytest.raises(ConfigError, match=f"--sweep does not work with {word.partition('=')[0]}"):
        sweep(*RANKS, word)


def test_a_sweep_is_not_started_by_torchrun(sweep, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    for name, value in {"LOCAL_RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="--sweep does not work with torchrun"):
        sweep(*RANKS)


def test_the_script_plans_and_refuses_sweeps(capsys, tmp_path):
    script = load_script("03_finetune")
    line = ["--config", str(ROOT / "configs/tiny.yaml"), "--run-dir", str(tmp_path / "run")]
    assert script.main([*line, *GRID, "--dry-run", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 4
    assert script.main([*line, "--sweep", "evaluation.limit=10,20", "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["what"] == "--sweep evaluation.limit: 03_finetune's result does not depend on it"
    assert not list(tmp_path.iterdir())
