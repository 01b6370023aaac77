"""A task's figures, from those of lm-eval and from what it says of each item."""

from __future__ import annotations

import hashlib
import json
import math
from numbers import Real
from typing import Any

_ACCURACIES = (("acc", "right"), ("acc_norm", "right_norm"))


def summarize(task: Any, result: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a task's figures.

    Args:
        task: lm-eval's task.
        result: its figures by `metric,filter`.
        samples: what it says of each item, for each filter.

    Returns:
        `items` and `requests_sha256`; of multiple choice `chance` and `log_likelihoods` (those of
        an item's endings, in nats); `acc` (most likely ending) and `acc_norm` (the same per
        character) if it has them, with `acc_stderr` and `acc_norm_stderr`, and `right` and
        `right_norm` (1 or 0 by item); `scores`: of each other metric, by its name, with the filter
        if there are several, {value, stderr, by_item, higher_is_better}. What a metric does not
        have is null: `by_item` if it is no mean over items, the stderr if lm-eval computes none.
        `answers`: the generated texts by item.
    """
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    by_filter = {name: [each for each in samples if each["filter"] == name] for name in filters}
    first = by_filter[filters[0]]
    requests = json.dumps([sample["arguments"] for sample in first], ensure_ascii=False)
    summary: dict[str, Any] = {
        "items": len(first),
        "requests_sha256": hashlib.sha256(requests.encode()).hexdigest(),
    }
    if task.OUTPUT_TYPE == "multiple_choice":
        summary["chance"] = sum(1 / len(sample["arguments"]) for sample in first) / len(first)
        summary["log_likelihoods"] = [
            [float(likelihood) for likelihood, _ in sample["filtered_resps"]] for sample in first
        ]
        for metric, kept in _ACCURACIES:
            if f"{metric},none" in result:
                summary[metric] = result[f"{metric},none"]
                summary[f"{metric}_stderr"] = result[f"{metric}_stderr,none"]
                summary[kept] = [int(sample[metric]) for sample in first]
    elif task.OUTPUT_TYPE == "generate_until":
        summary["answers"] = [sample["resps"][0][0] for sample in first]
    summary["scores"] = _list_scores(task, result, by_filter, summary)
    return summary


def _list_scores(
    task: Any, result: dict[str, Any], by_filter: dict[str, list[Any]], summary: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    better, scores = task.higher_is_better(), {}
    for key, value in result.items():
        metric, _, name = key.partition(",")
        is_shown = name == "none" and metric in summary
        if not name or is_shown or metric.endswith("_stderr"):
            continue
        label = f"{metric} ({name})" if len(by_filter) > 1 else metric
        scores[label] = {
            "value": _number(value),
            "stderr": _number(result.get(f"{metric}_stderr,{name}")),
            "by_item": _by_item(metric, value, by_filter[name]),
            "higher_is_better": better.get(metric),
        }
    return scores


def _number(value: Any) -> float | None:
    """Return a finite number, or None."""
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


def _by_item(metric: str, value: Any, samples: list[dict[str, Any]]) -> list[float] | None:
    """Return a metric's value for each item if their mean is the metric."""
    found = [sample.get(metric) for sample in samples]
    values = [float(each) for each in found if isinstance(each, Real)]
    if len(values) < len(found):
        return None
    is_mean = math.isclose(sum(values) / len(values), value, rel_tol=1e-6, abs_tol=1e-9)
    return values if is_mean else None
