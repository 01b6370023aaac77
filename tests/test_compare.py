"""Runs are compared by what they have in common, and what they have not is said."""

import json
import shutil

import pytest

from sparselong.compare import compare, main
from sparselong.errors import StageError
from tests.report.made_run import read, rewrite, write_run, write_stage


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("made") / "one")


@pytest.fixture
def runs(made, tmp_path):
    return [shutil.copytree(made, tmp_path / name) for name in ("one", "two")]


def change(run, stage, **metrics) -> None:
    found = read(run, stage)["metrics"]
    rewrite(run / stage / "manifest.json", metrics=found | metrics)


def find(document, group, name) -> dict:
    (figure,) = [f for f in document["results"] if (f["group"], f["name"]) == (group, name)]
    return figure


def test_equal_runs_differ_in_nothing(runs):
    document = compare(runs)
    assert document["config"] == {} and document["notes"] == []
    for figure in document["results"]:
        first, second = figure["values"].values()
        assert first == second and figure["differs_in"] == []
    assert find(document, "Perplexity", "finetuned")["values"][str(runs[0])] == 4.125
    accuracy = find(document, "demo_hellaswag", "acc, compressed")
    assert list(accuracy["values"].values()) == [0.25, 0.25]
    assert list(accuracy["stderrs"].values()) == [0.2171, 0.2171]
    groups = {figure["group"] for figure in document["results"]}
    assert groups == {"Training", "Perplexity", "demo_hellaswag", "Size", "Time and memory"}


def test_figures_of_the_user_are_compared_at_the_best_step(runs):
    for run, accuracy in zip(runs, (0.25, 0.5), strict=True):
        own = {"0": {"acc": 0.0, "odd": None}, "60": {"acc": accuracy, "odd": None}}
        change(run, "03_finetune", metrics=own)
    found = find(compare(runs), "Training", "acc at best step")
    assert list(found["values"].values()) == [0.25, 0.5] and found["differs_in"] == []
    config = read(runs[1], "03_finetune")["config"]
    config["training"]["metrics"] = "other.py:acc"
    rewrite(runs[1] / "03_finetune/manifest.json", config=config)
    assert find(compare(runs), "Training", "acc at best step")["differs_in"] == ["training.metrics"]


def test_what_differs_is_shown_with_exact_values(runs, capsys):
    config = read(runs[1], "03_finetune")["config"]
    config["training"]["learning_rate"] = 1e-5
    config["lora"]["expert_targets"] = ["down_proj"]
    rewrite(runs[1] / "03_finetune/manifest.json", config=config, seconds=5400.0)
    change(runs[1], "03_finetune", train_loss=2.125)
    assert main([*map(str, runs), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    one, two = map(str, runs)
    assert document["config"]["training.learning_rate"] == {one: 2e-4, two: 1e-5}
    assert document["config"]["lora.expert_targets"] == {one: [], two: ["down_proj"]}
    assert len(document["config"]) == 2
    loss = find(document, "Training", "last training loss")
    assert loss["values"] == {one: 2.4, two: 2.125} and loss["differs_in"] == []
    assert main([*map(str, runs)]) == 0
    text = capsys.readouterr().out
    assert "| `training.learning_rate` | 0.0002 | 1e-05 |" in text
    assert "| last training loss | 2.4 | 2.125 |" in text
    assert "| 03_finetune, time | 90 s | 90 min |" in text
    assert "| acc, finetuned | 75.00 % ± 21.71 % | 75.00 % ± 21.71 % |" in text
    assert "†" not in text


def other_data(run) -> None:
    rows = read(run, "03_finetune")["inputs"]
    rewrite(run / "03_finetune/manifest.json", inputs=[rows[0], rows[1] | {"sha256": "other"}])


def other_date(run) -> None:
    rewrite(run / "03_finetune/manifest.json", date="2026-02-01")


def other_items(run) -> None:
    rewrite_results(run, lambda r: r["tasks"]["demo_hellaswag"]["base"].update(requests_sha256="x"))


def other_conversations(run) -> None:
    rewrite_results(run, lambda r: r["settings"].update(conversations=5))


def other_hardware(run) -> None:
    rewrite(run / "02_compress/manifest.json", hardware={"machine": "aarch64"})


def other_base(run) -> None:
    row = {"path": "/base/model.safetensors", "bytes": 1, "sha256": "other"}
    rewrite(run / "02_compress/manifest.json", inputs=[row])


def rewrite_results(run, edit) -> None:
    path = run / "04_eval/results.json"
    found = json.loads(path.read_text())
    edit(found)
    path.write_text(json.dumps(found))


CASES = {
    other_data: ("data, validation.jsonl", {"best validation perplexity"}),
    other_date: ("date in the chat template", {"last training loss", "best validation perplexity"}),
    other_items: ("requests", {"acc, base"}),
    other_conversations: ("number of conversations", {"base", "compressed", "finetuned"}),
    other_base: ("files of the base", {f"paired_flips.{change}, {model}"
                 for change in ("gained", "lost") for model in ("compressed", "finetuned")}),
    other_hardware: ("machine, cpu_count, gpus", {"02_compress, time",
                     "02_compress, peak host memory", "02_compress, peak GPU memory"}),
}  # fmt: skip


@pytest.mark.parametrize("edit", CASES, ids=lambda edit: edit.__name__)
def test_figures_that_were_not_measured_on_the_same_are_marked(runs, capsys, edit):
    edit(runs[1])
    parts, names = CASES[edit]
    document = compare(runs)
    assert {f["name"] for f in document["results"] if f["differs_in"]} == names
    (note,) = [note for note in document["notes"] if note.startswith("†")]
    assert f"not measured on the same ({parts})" in note
    main([*map(str, runs)])
    text = capsys.readouterr().out
    assert all(f"| {name} † |" in text for name in names) and f"> {note}" in text


def test_stages_that_only_one_run_has_are_shown_as_missing(runs, capsys):
    shutil.rmtree(runs[1] / "04_eval")
    shutil.rmtree(runs[1] / "05_export")
    third = runs[0].with_name("three")
    write_stage(third, "02_compress", {"bytes_on_disk": 2**30}, {})
    assert main([*map(str, runs), str(third)]) == 0
    text = capsys.readouterr().out
    assert "| compressed model | 12.00 GiB | 12.00 GiB | 1.00 GiB |" in text
    assert "| finetuned | 4.125 | – | – |" in text
    assert "| 05_export/gguf | 12.00 GiB | – | – |" in text


def test_figures_of_other_tasks_and_those_that_are_not_finite_are_kept(runs, capsys):
    score = {
        "value": 0.5,
        "stderr": 0.125,
        "higher_is_better": True,
        "to_base": {"difference": 0.0},
    }
    rows = dict.fromkeys(("base", "finetuned"), {"scores": {"score": score}, "items": 50})
    tasks = {"ruler_vt_4096": {**rows, "other": {"f1": 0.5, "f1_stderr": 0.25}}}
    for run in runs:
        change(run, "04_eval", tasks=tasks, divergence={"finetuned": 0.0625}, note="text")
    change(runs[1], "03_finetune", train_loss=float("nan"))
    document = json.loads(json.dumps(compare(runs), allow_nan=False))
    assert list(find(document, "ruler_vt_4096", "score, base")["stderrs"].values()) == [0.125] * 2
    assert list(find(document, "ruler_vt_4096", "f1, other")["stderrs"].values()) == [0.25] * 2
    names = [f["name"] for f in document["results"] if f["group"] == "ruler_vt_4096"]
    assert "score.to_base.difference, finetuned" in names
    assert "score.to_base.difference, base" not in names
    other = find(document, "Other figures of stage 04", "divergence.finetuned")
    assert list(other["values"].values()) == [0.0625] * 2
    assert list(find(document, "Training", "last training loss")["values"].values()) == [2.4, None]
    main([*map(str, runs)])
    assert "| last training loss | 2.4 | not finite |" in capsys.readouterr().out


def test_other_code_and_replaced_results_are_told(runs):
    rewrite(runs[1] / "01_health/manifest.json", git_commit="b" * 40, git_dirty=True)
    write_stage(runs[0], "02_compress", read(runs[0], "02_compress")["metrics"], {"a": "other"})
    notes = "\n".join(compare(runs)["notes"])
    assert "aaaaaaaaaaaa, bbbbbbbbbbbb with changes" in notes
    assert f"{runs[0]}: 03_finetune was made from a result of 02_compress replaced since" in notes


def test_results_that_have_changed_since_they_were_written_are_told(runs):
    other_conversations(runs[1])
    told = f"{runs[1]}: 04_eval/results.json has changed since 04_eval"
    assert told in compare(runs)["notes"]
    (runs[1] / "04_eval/report.md").unlink(missing_ok=True)  # what is gone has not changed
    assert [note for note in compare(runs)["notes"] if "has changed" in note] == [told]


def test_what_cannot_be_compared_is_refused_by_name(runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "sweep.md").write_text("| lora.r |")  # as in runs/NAME-sweep/*
    for names, code, told in (
        (["one", "sweep.md"], 1, "sweep.md has no finished stage to compare"),
        (["one", "empty"], 1, "empty has no finished stage to compare"),
        (["gone", "one"], 1, "gone has no finished stage to compare"),
        (["one"], 2, "two or more directories of different runs"),
        (["one", "two/../one"], 2, "two or more directories of different runs"),
    ):
        assert main([str(tmp_path / name) for name in names]) == code
        printed = capsys.readouterr()
        assert told in printed.err and printed.out == ""
    (runs[1] / "04_eval/results.json").write_text("{")
    with pytest.raises(StageError, match=r"two/04_eval/results\.json cannot be read"):
        compare(runs)


@pytest.mark.parametrize(
    ("file", "keys", "value"),
    [
        ("results.json", ("tasks",), None),
        ("results.json", ("perplexity", "base", "supervised"), 3),
        ("manifest.json", ("metrics", "tasks"), "x"),
        ("manifest.json", ("outputs", 0, "path"), 7),
        ("manifest.json", ("hardware",), True),
        ("manifest.json", ("made_from",), None),
    ],
)
def test_values_that_no_stage_writes_are_refused_by_name(runs, file, keys, value):
    path = runs[1] / "04_eval" / file
    document = place = json.loads(path.read_text())
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(document))
    with pytest.raises(StageError, match=r"two( holds figures|/04_eval/manifest\.json is damaged)"):
        compare(runs)


def test_names_with_bars_do_not_break_the_table(made, tmp_path, capsys):
    names = [str(shutil.copytree(made, tmp_path / name)) for name in ("a|b", "c")]
    assert main(names) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") == 4 for line in lines)
