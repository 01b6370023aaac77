"""The report states what was measured, with the correct signs."""

import copy
import json

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D

from sparselong.config import schema as config_module
from sparselong.evaluate import report
from sparselong.evaluate.models import keep


def model(right, nll):
    accuracy = sum(right) / len(right)
    task = {
        "items": len(right),
        "chance": 0.25,
        "requests_sha256": "same",
        **{"acc": accuracy, "acc_stderr": 0.0312, "right": right},
        **{"acc_norm": accuracy, "acc_norm_stderr": 0.0312, "right_norm": right},
        "scores": {},
    }
    drawn = {"items": 4, "requests_sha256": "same", "answers": ["a", "b", "c", "d"]}
    halves = [each * 0.5 for each in right]
    score = {"value": accuracy / 2, "stderr": 0.01, "by_item": halves, "higher_is_better": True}
    bits = {"value": nll / 8, "stderr": None, "by_item": None, "higher_is_better": False}
    sums = {"nll": nll, "tokens": 10, "perplexity": 7.25 + nll}
    return {
        "tasks": {
            "demo_hellaswag": task,
            "ruler_vt_4096": {**drawn, "scores": {"score": score}},
            "ruler_vt_8192": {**drawn, "scores": {"score": {**score, "value": 0.125}}},
            "wikitext": {**drawn, "scores": {"bits_per_byte": bits}},
        },
        "divergence": None if nll == 10 else divergence(nll),
        "health": {"low": health(right), "high": health(right[::-1])},
        "speed": {
            "load_seconds": 12.3,
            "prompts": [
                {
                    "up_to_tokens": 4096,
                    "prompts": 4,
                    "first_token_seconds": 0.5,
                    "prompt_tokens_per_second": 8000.0,
                    "tokens_per_second": nll,
                }
            ],
        },
        "perplexity": {
            "supervised": sums,
            "all": {**sums, "tokens": 30},
            "by_position": [{"first": 64, "last": 95, **sums}, {"first": 96, "last": 127, **sums}],
            "conversations": [[nll / 2, 5], [nll / 2, 5]],
        },
    }


def health(right):
    return {
        **{"answers": len(right), "ended": sum(right), "looped": 1, "malformed": 2, "no_final": 0},
        "repairs": {"unknown channel": 3, "stray mark": 1},
        "tokens": {"mean": 40.4, "median": 38.0, "most": 64},
        "said": [{"question": "Why?", "messages": [["final", "Because."]]}],
    }


def divergence(nll):
    """Figures of a model that diverges by its loss, and at all positions alike."""
    sums = {"kl": nll / 100, "agreement": 0.75, "tokens": 10}
    points = [{"first": 64, "last": 95, **sums}, {"first": 96, "last": 127, **sums}]
    none = {"kl": None, "agreement": None, "tokens": 0}
    return {"supervised": none, "all": sums, "by_position": points, "conversations": 2}


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
    drawn = metrics["tasks"]["ruler_vt_4096"]["compressed"]["scores"]["score"]
    assert (drawn["value"], drawn["to_base"]["lost"]) == (0.125, 2) and "by_item" not in drawn
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


def test_a_single_conversation_has_no_standard_error_in_report_or_json(models):
    for each in models.values():
        each["perplexity"]["conversations"] = [[each["perplexity"]["all"]["nll"], 10]]
    built = build(models)
    assert "| compressed | 19.250 | × 1.2214 | +0.2000 | 19.250 |" in report.render(built)
    json.dumps(built, allow_nan=False)


def test_what_is_told_of_a_model_names_scores_of_zero(models, tmp_path):
    told, measured = [], {**models["base"], "seconds": 1.0}
    measured["tasks"]["ruler_vt_4096"]["scores"]["score"]["value"] = 0.0
    keep("base", measured, tmp_path, told.append)
    assert "ruler_vt_4096 score 0.000" in told[0]


def test_other_scores_and_speed_have_tables_of_their_own(models):
    text = report.render(build(models))
    assert "| ruler_vt | 4,096 | 8,192 |" in text
    assert "| base | 37.5% ± 1.0% | 12.5% ± 1.0% |" in text
    assert "| finetuned | 50.0% ± 1.0% (+1 / −0) | 12.5% ± 1.0% (+1 / −0) |" in text
    assert "| base | bits_per_byte | 1.2500 |  |  |  |" in text
    assert "| compressed | bits_per_byte | 1.5000 | +0.2500 | – | – |" in text
    assert "| finetuned | 12.3 s | ≤ 4,096 tokens | 4 | 0.50 s | 8,000 | 9.0 |" in text
    assert "## ruler_vt" not in text
    assert "wikitext bits_per_byte 1.125" in report.summarize(build(models)).splitlines()[2]


def test_divergence_is_shown_by_position_and_what_is_left_out_is_named(models):
    text = report.render(build(models))
    assert "| all | 10 | 0.1200, 75.0% | 0.0900, 75.0% |" in text
    assert "| supervised | 0 | – | – |" in text
    assert "| 96–127 | 10 | 0.1200, 75.0% | 0.0900, 75.0% |" in text
    models["compressed"]["divergence"] = {"left_out": "its lm_head is not the base's"}
    other = build(models)
    assert "compressed is not compared: its lm_head is not the base's." in report.render(other)
    assert report.list_metrics(other)["divergence"]["finetuned"]["agreement"] == 0.75
    for model in models.values():
        model["divergence"] = None
    assert "Divergence" not in report.render(build(models))


def test_health_is_counted_by_effort_and_not_judged(models):
    text = report.render(build(models))
    row = "4 | 1 | 1 | 2 | 0 | 40, 38, 64 | unknown channel 3, stray mark 1"
    assert f"| compressed | low | {row} |" in text and f"| compressed | high | {row} |" in text
    counted = report.list_metrics(build(models))["health"]["base"]["low"]
    assert counted["ended"] == 3 and "said" not in counted  # texts stay in <model>.json
    for model in models.values():
        model["health"] = {}
    assert "in a chat" not in report.render(build(models))


def test_plot_is_an_image(models, tmp_path):
    report.draw(build(models), tmp_path / "evaluation.png")
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_has_one_colour_of_its_own_in_all_panels(models, tmp_path, monkeypatch):
    drawn, found = [], {}
    monkeypatch.setattr(FigureCanvasAgg, "print_png", lambda self, path: drawn.append(self.figure))
    models |= {name: copy.deepcopy(models["finetuned"]) for name in ("runs/a", "runs/b")}
    models["runs/a"]["divergence"] = {"left_out": "its lm_head is not the base's"}
    report.draw(build(models), tmp_path / "evaluation.png")
    for axis in drawn[0].axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            part = handle if isinstance(handle, Line2D) else handle[0]
            colour = part.get_facecolor() if hasattr(part, "get_facecolor") else part.get_color()
            found.setdefault(name, set()).add(to_hex(colour))
    assert found.keys() == models.keys() and all(len(colours) == 1 for colours in found.values())
    assert len(set.union(*found.values())) == len(models)


@pytest.mark.parametrize(
    ("places", "wanted"),
    [
        ([64.0, 100.0], ["64", "128"]),  # one power of two would be one tick
        ([64.0], ["64", "128"]),
        ([4096, 8192, 16384, 32768], ["4K", "8K", "16K", "32K"]),
        ([1.0, 30_000.0], ["1", "4", "16", "64", "256", "1K", "4K", "16K", "64K"]),
    ],
)
def test_the_axis_of_tokens_has_several_labelled_ticks(places, wanted):
    from matplotlib.figure import Figure

    from sparselong.evaluate.report.plot import _scale_tokens

    axis = Figure().subplots()
    axis.plot(places, places)
    _scale_tokens(axis, places)
    assert [label.get_text() for label in axis.get_xticklabels()] == wanted
    low, high = axis.get_xlim()
    assert low < min(places) and max(places) < high
    assert all(low < tick < high for tick in axis.get_xticks())


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
