"""The page shows what the run's files say, and tells of what it cannot read."""

import json
import os
import re
import shutil

import pytest

from sparselong.errors import StageError
from sparselong.report import write_page
from sparselong.report.__main__ import main
from sparselong.report.curves import colour_of
from tests.report.made_run import EVIL, MODELS, read, results, rewrite, write_run, write_stage
from tests.report.reading import Page

ALLOWED = set(
    "a b body br code dd details div dl dt figcaption figure footer h1 h2 h3 h4 head header html i"
    " main mark meta nav p path pre section span style summary svg table tbody td th thead title tr"
    " caption".split()
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("made") / "größe & 1")


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def page_of(run_dir) -> Page:
    return Page(write_page(run_dir).read_text(encoding="utf-8"))


def test_all_stages_are_on_the_page(made):
    page = page_of(made)
    assert made.name in page.text and page.text.count("01_health") >= 1
    for text in (
        *("lora.r 24 16", "disk warn", "1 ok, 1 with a warning"),
        *("03_finetune, planned 15.00 GiB", "activation checkpoints – 3.00 GiB –"),
        *("measured 11.00 GiB 11.00 GiB 11.00 GiB", "difference +340 % −27 % −15 %"),
        *("planned 5 min 60 min 10 min", "12.00 GiB, 92.3 % of the base's", "experts 4.250"),
        *("23 0.4300 0.1000", "Best validation perplexity 4.482", "57 1.140 % 1.140 %"),
        *("Warning: 5 items like </td><script>", "train: 2 left out"),
        *("my_figure", "Tokens per second, median 1,234", "compressed 25.0 % ± 21.7 %"),
        *("fine-tuned 75.00 % +25.00 ± 25.00 points +2 −1 0.5000", "× 0.5500"),
        *("128–255 7,248 7.625 8.375 4.250", "three ✓ 33 % 33 % 33 %", "wrong wrong right"),
        "Kept for the backward pass: experts' gate_up in the last 3 of 24 layers.",
        *("gguf from finetuned 12.00 GiB", "H200, 141 GB", "torch 2.13.0"),
    ):
        assert text in page.text, text
    marked = [f for tag, f in page.elements if tag == "mark"]
    assert len(marked) == 1 and f"answered {EVIL}" in page.text


def test_curves_are_those_of_the_files(made):
    text = write_page(made).read_text(encoding="utf-8")
    assert text.count('class="column third"') == 19  # mask updates
    assert "Training loss: 2.400 at step 60" in text and "q_proj: 0.4300 at layer 23" in text
    assert len(re.findall(r"<title>compressed: [\d.]+ at tokens of context", text)) == 4


def test_nothing_on_the_page_can_run_or_load(made):
    """Samples, data and findings hold a script and an image; the page shows them as text."""
    page = page_of(made)
    assert page.tags <= ALLOWED and page.text.count("<script>") >= 8
    policies = [f["content"] for tag, f in page.elements if f.get("http-equiv")]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    for tag, attributes in page.elements:
        assert not {"src", "onerror", "onclick", "srcset", "action"} & attributes.keys()
        assert tag != "a" or (attributes["href"] or "").startswith("#")
    style = (made / "report.html").read_text(encoding="utf-8").partition("<style>")[2]
    assert "url(" not in style.partition("</style>")[0] and "@import" not in style


def test_only_finished_stages_are_shown(tmp_path):
    run_dir = tmp_path / "run"
    write_stage(run_dir, "02_compress", {"bytes_on_disk": 5, "base_bytes_on_disk": 10}, {})
    page = page_of(run_dir)
    assert "50.0 % of the base" in page.text and "No layer's error was recorded." in page.text
    assert "Nothing was planned: stage 01 is not done." in page.text
    assert "04_eval – – – not done" in page.text
    assert "Fine-tuning" not in page.text and "Samples" not in page.text


@pytest.mark.parametrize("metrics", [{}, {"mask_updates": [], "best_step": None}])
def test_a_stage_without_figures_is_no_failure(tmp_path, metrics):
    write_stage(tmp_path, "03_finetune", metrics, {"metrics.jsonl": "", "supervision.txt": ""})
    write_stage(tmp_path, "04_eval", metrics, {"results.json": "{}"})
    text = page_of(tmp_path).text
    assert "Masks were not updated." in text and "Training loss: no figures" in text


def test_results_that_other_versions_add_are_shown_as_they_are(tmp_path):
    ruler = {model: {"score": 0.5, "score_stderr": 0.125} for model in MODELS}
    positions = [
        {"first": 1, "last": 1, "kl": 0.25, "agreement": 0.5, "tokens": 30},
        {"first": 2, "last": 3, "kl": 0.5, "agreement": 1.0, "tokens": 60},
    ]
    whole = {"all": {"kl": 0.375, "agreement": 0.75}, "by_position": positions}
    kl = {"base": None, **dict.fromkeys(MODELS[1:], whole)}
    health = [{"prompt": EVIL, "answer": "yes\n" * 3, "missing_end": 1}]
    more = {"divergence": kl, "generation_health": health, "note": "text", "speed": {"base": 768.5}}
    run_dir = write_run(tmp_path / "run", **more)
    found = results(**more)
    found["tasks"]["ruler_vt_4096"] = ruler
    (run_dir / "04_eval/results.json").write_text(json.dumps(found))
    page = page_of(run_dir)
    for text in ("ruler_vt_4096", "finetuned 0.5000 0.1250", "Generation health", "768.5"):
        assert text in page.text, text
    assert "compressed 0.3750 0.7500 finetuned 0.3750 0.7500" in page.text
    assert "2–3 60 0.5000 0.5000" in page.text and "2–3 60 1.000 1.000" in page.text
    assert page.text.count("Agreement by position") == 2
    assert page.text.count("KL by position") == 2
    assert page.tags <= ALLOWED


def scored(value: float, by_item: list[float] | None = None, **more) -> dict:
    """A row of a task whose answers are generated."""
    pair = {"difference": value - 0.5, "stderr": 0.25, "gained": 1, "lost": 0, "p": 1.0}
    score = {"value": value, "stderr": 0.125, "higher_is_better": True}
    score |= {"to_base": pair} if by_item is None else {"by_item": by_item}
    return {"items": 2, "requests_sha256": "r", "scores": {"score": score}, **more}


@pytest.fixture
def generated_run(tmp_path):
    """A run with a task whose answers are generated, and one of several lengths."""
    run_dir = write_run(tmp_path / "run")
    found = results()
    values = dict(zip(MODELS, (0.5, 0.25, 1.0), strict=True))
    for task in ("gsm", "ruler_vt_4096", "ruler_vt_8192", "ruler_vt_16384"):
        found["tasks"][task] = {model: scored(value) for model, value in values.items()}
    (run_dir / "04_eval/results.json").write_text(json.dumps(found))
    by_item = dict(zip(MODELS, ([1.0, 0.0], [0.5, 0.0], [1.0, 1.0]), strict=True))
    for model in MODELS:
        answers = [f"first of {model}", f"{EVIL} {'long ' * 400}"]
        row = scored(values[model], by_item[model], answers=answers)
        rewrite(run_dir / f"04_eval/{model}.json", tasks={"gsm": row, "ruler_vt_4096": row})
    items = [{"prompt": "x" * 5000 + f"the question {EVIL}", "answers": ["42", "43"]}] * 2
    text = "".join(json.dumps(item) + "\n" for item in items)
    (run_dir / "04_eval/tasks/ruler_vt_4096.jsonl").write_text(text)
    return run_dir


def test_generated_answers_are_side_by_side(generated_run):
    page = page_of(generated_run)
    for text in (
        *("Of 2 items, the fine-tuned model gained 1 and lost 0.", "first of compressed"),
        *("compressed, score 0.5", "Wanted: 42, 43", "characters before) … "),
        *("the question", "more characters)", "This task's texts are not in the run."),
    ):
        assert text in page.text, text
    assert page.text.count("first of base") == 2 and page.tags <= ALLOWED | {"bdi"}
    assert page.text.index("item 2 This task") < page.text.index("item 1 This task")  # gained


def test_scores_are_shown_with_errors_and_over_the_context(generated_run):
    page = page_of(generated_run)
    assert "fine-tuned 1.000 ± 0.1250 +0.5000 ± 0.2500, +1 / −0" in page.text
    assert "ruler_vt 8,192 0.5000 ± 0.1250 0.2500 ± 0.1250 1.000 ± 0.1250" in page.text
    assert "fine-tuned: 1.000 at tokens of context 16,384" in page.text
    assert page.text.count("Scores by context length") == 1


def test_figures_that_are_not_finite_are_no_failure(run):
    path = run / "04_eval/results.json"
    text = path.read_text().replace("7.5625", "Infinity").replace("0.0023", "NaN")
    path.write_text(text)
    lines = (run / "03_finetune/metrics.jsonl").read_text()
    (run / "03_finetune/metrics.jsonl").write_text(lines.replace('"loss": 2.4', '"loss": NaN'))
    page = page_of(run)
    assert "+0.0125 ± –" in page.text and "64–127 7,248 ∞ 8.312 4.188" in page.text


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("04_eval/results.json", "{", "04_eval/results.json is not JSON"),
        ("04_eval/results.json", "[1]", "04_eval/results.json is not a JSON object."),
        ("04_eval/base.json", None, "04_eval/base.json cannot be read: No such file or directory."),
        ("03_finetune/metrics.jsonl", '{"step": 1, "loss": 2.5}\n{"st', "1 of the 2 lines of"),
        ("03_finetune/metrics.jsonl", "[]\n1\n", "2 of the 2 lines of"),
        ("03_finetune/supervision.txt", "other", "has changed since 03_finetune recorded it."),
    ],
)
def test_what_cannot_be_read_or_has_changed_is_told(run, file, text, told):
    if text is None:
        (run / file).unlink()
    else:
        (run / file).write_text(text)
    page = page_of(run)
    assert told in page.text and "Compression" in page.text
    assert page.count("p", "warning") >= 2


def test_results_made_from_replaced_ones_are_told(run):
    before = page_of(run).text
    (run / "02_compress/model.txt").write_text("other")
    write_stage(run, "02_compress", read(run, "02_compress")["metrics"], {"model.txt": "other"})
    told = "03_finetune was made from a result of 02_compress that has been replaced since"
    assert told not in before and told in page_of(run).text


def test_stages_of_several_machines_are_told_apart(run):
    rewrite(run / "03_finetune/manifest.json", hardware={"machine": "aarch64", "cpu_count": 8})
    text = page_of(run).text
    assert "did not all run in the same environment" in text and "aarch64, 8 cores" in text


def test_values_are_those_that_each_stage_was_made_with(run):
    """config.yaml, and the manifest of a later stage, may have other values by now."""
    config = read(run, "04_eval")["config"]
    config["lora"]["r"], config["evaluation"]["batch_size"] = 99, 77
    rewrite(run / "04_eval/manifest.json", config=config)
    text = page_of(run).text
    assert "lora.r 24 16" in text and "evaluation.batch_size 77 8" in text


def test_a_page_of_a_person_is_not_replaced(run, capsys):
    (run / "report.html").write_text("<h1>my notes</h1>")
    with pytest.raises(StageError, match=r"report\.html was not written by Sparse-Long"):
        write_page(run)
    assert (run / "report.html").read_text() == "<h1>my notes</h1>"
    assert main([str(run)]) == 1 and "move it away" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["report.html", "report.html.partial"])
def test_a_page_that_cannot_be_written_is_an_expected_failure(run, name):
    (run / "report.html").unlink(missing_ok=True)
    (run / name).mkdir()
    with pytest.raises(StageError, match="cannot be written"):
        write_page(run)


def test_the_command_prints_the_page_or_why_there_is_none(run, tmp_path, capsys):
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    for empty in (tmp_path / "gone", tmp_path):
        assert main([str(empty)]) == 1
        assert f"error:    no stage is done in {empty}" in capsys.readouterr().err
    rewrite(run / "02_compress/manifest.json", format_version=1)
    assert main([str(run)]) == 1 and "another version" in capsys.readouterr().err
    assert os.listdir(tmp_path / "run").count("report.html") == 1


@pytest.mark.parametrize("broken", ["train_loss", "mask_updates"])
def test_a_figure_that_is_none_costs_its_section_and_not_the_page(run, broken):
    metrics = read(run, "03_finetune")["metrics"]
    spoiled = {broken: [["x"]] if broken == "mask_updates" else {"x": []}}
    rewrite(run / "03_finetune/manifest.json", metrics=metrics | spoiled)
    rows = run / "03_finetune/metrics.jsonl"
    rows.write_text(rows.read_text() + '{"step": "60", "loss": 1.0}\n')
    page = page_of(run)
    assert "1 of the" in page.text and "not JSON objects with a number as step" in page.text
    assert ("Fine-tuning cannot be shown: " in page.text) == (broken == "mask_updates")
    assert "my_figure" in page.text or broken == "mask_updates"
    assert "Evaluation" in page.text and "gguf from finetuned" in page.text


@pytest.mark.parametrize("file", ["results.json", "manifest.json"])
def test_figures_of_another_kind_cost_the_summary_and_not_the_page(run, file):
    if file == "manifest.json":
        rewrite(run / "04_eval" / file, metrics={"tasks": 3})
    else:
        rewrite(run / "04_eval" / file, tasks=None, perplexity=[], files=3)
    page = page_of(run)
    assert ("The summary cannot be shown" in page.text) == (file == "manifest.json")
    assert "gguf from finetuned" in page.text and "Training loss" in page.text


def test_figures_of_the_user_are_beside_each_validation_loss(run):
    rows = run / "03_finetune/metrics.jsonl"
    last = {"step": 61, "eval_loss": 1.25, "eval_perplexity": 3.5, "metrics": {"<acc>": 0.75}}
    rows.write_text(rows.read_text() + json.dumps(last) + "\n")
    text = page_of(run).text
    assert "validation loss perplexity <acc> 0 2.000 7.389 –" in text
    assert "61 1.250 3.500 0.7500" in text


def test_models_that_are_compared_have_different_colours():
    models = [*MODELS, "runs/ab", "runs/ba"]
    assert len({colour_of(model, models) for model in models}) == len(models)


def test_answers_in_a_chat_are_side_by_side(run):
    for model in MODELS:
        said = [{"question": f"Why {EVIL}?", "messages": [["analysis", "Hm."], ["final", model]]}]
        rewrite(
            run / f"04_eval/{model}.json", health={"low": {"said": []}, "medium": {"said": said}}
        )
    page = page_of(run)
    assert "Answers in a chat With medium reasoning effort" in page.text
    wanted = "base analysis: Hm. base compressed analysis: Hm. compressed fine-tuned analysis: Hm."
    assert f"Why {EVIL}? {wanted} finetuned" in page.text and page.tags <= ALLOWED
