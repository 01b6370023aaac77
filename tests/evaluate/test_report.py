"""The report states what was measured, with the correct signs."""

import copy

import pytest

from sparselong.config import schema as config_module
from sparselong.evaluate import report


def model(right, nll):
    accuracy = sum(right) / len(right)
    task = {
        "items": len(right),
        "chance": 0.25,
        "requests_sha256": "same",
        **{"acc": accuracy, "acc_stderr": 0.0312, "right": right},
        **{"acc_norm": accuracy, "acc_norm_stderr": 0.0312, "right_norm": right},
    }
    sums = {"nll": nll, "tokens": 10, "perplexity": 7.25 + nll}
    return {
        "tasks": {"demo_hellaswag": task},
        "perplexity": {
            "supervised": sums,
            "all": {**sums, "tokens": 30},
            "by_position": [{"first": 64, "last": 95, **sums}, {"first": 96, "last": 127, **sums}],
            "conversations": [[nll / 2, 5], [nll / 2, 5]],
        },
    }


@pytest.fixture
def models():
    return {
        "base": model([1, 1, 1, 0], 10.0),
        "compressed": model([1, 0, 0, 0], 12.0),
        "finetuned": model([1, 1, 1, 1], 9.0),
    }


def build(models, warnings=()):
    return report.build_results(config_module.load("configs/tiny.yaml"), models, list(warnings))


def test_metrics_have_the_documented_keys(models):
    metrics = report.list_metrics(build(models))
    assert set(metrics["tasks"]["demo_hellaswag"]) == {"base", "compressed", "finetuned"}
    for row in metrics["tasks"]["demo_hellaswag"].values():
        assert {"acc", "acc_norm", "stderr", "paired_flips"} <= set(row)
    lost = metrics["tasks"]["demo_hellaswag"]["compressed"]["paired_flips"]
    assert (lost["gained"], lost["lost"]) == (0, 2)
    assert metrics["perplexity"] == {"base": 17.25, "compressed": 19.25, "finetuned": 16.25}


def test_report_text(models):
    text = report.render(build(models, ["2 of the 4 items are known"]))
    assert "> **Warning:** 2 of the 4 items are known" in text
    assert "| base | 75.00% ± 3.12% |  |  |  |" in text
    assert "| compressed | 25.00% ± 3.12% | -50.00 ± 28.87 points | +0 / −2 | 0.500 |" in text
    assert "| finetuned | 100.00% ± 3.12% | +25.00 ± 25.00 points | +1 / −0 | 1.000 |" in text
    assert "| compressed | 19.250 | × 1.2214 | +0.2000 ± 0.0000 | 19.250 |" in text
    assert "| 96–127 | 10 | 17.250 | 19.250 | 16.250 |" in text
    assert "flips +1 -0" in report.summarize(build(models)).splitlines()[2]


def test_plot_is_an_image(models, tmp_path):
    report.draw(build(models), tmp_path / "evaluation.png")
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")


def test_task_without_normalized_accuracy(models, tmp_path):
    for measured in models.values():
        for key in ("acc_norm", "acc_norm_stderr", "right_norm"):
            del measured["tasks"]["demo_hellaswag"][key]
    results = build(models)
    assert "| 0.500 | – | – | – | – |" in report.render(results)
    report.draw(results, tmp_path / "evaluation.png")
    assert report.list_metrics(results)["tasks"]["demo_hellaswag"]["base"]["acc_norm"] is None


def test_different_questions_are_not_compared(models):
    other = copy.deepcopy(models)
    other["finetuned"]["tasks"]["demo_hellaswag"]["requests_sha256"] = "another"
    with pytest.raises(ValueError, match="different questions"):
        build(other)
