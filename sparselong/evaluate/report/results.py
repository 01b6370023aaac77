"""Comparison of the models: results.json and the manifest's metrics.

The base is the reference: every other figure is shown with its difference from the base under the
same settings and the standard error of that difference. Leaderboard figures of the base were
measured with other settings and are not shown.
"""

from __future__ import annotations

from typing import Any

from sparselong.config import Config
from sparselong.evaluate import paired

_BY_ITEM = ("right", "right_norm", "log_likelihoods", "answers", "scores")
"""What `<model>.json` holds for each item of a task, and the report leaves out or compares."""


def build_results(
    config: Config, models: dict[str, dict[str, Any]], warnings: list[str]
) -> dict[str, Any]:
    """Return all measurements and comparisons.

    Args:
        config: the run's config.
        models: results of `models.measure` by name; `base` is the reference.
        warnings: shown at the top of the report.

    Returns:
        {settings, warnings, tasks: task → model → figures, perplexity: model → figures,
        divergence: model → figures, null for the base; health: model → effort → figures;
        speed: model → figures}.

    Raises:
        ValueError: the models were measured on different requests or tokens.
    """
    base = models["base"]
    return {
        "settings": {
            **config.evaluation.model_dump(mode="json"),
            "seed": config.seed,
            "sequence_len": config.sequence_len,
            "train_on": config.data.train_on,
            "conversations": len(base["perplexity"]["conversations"]),
        },
        "warnings": warnings,
        "tasks": {
            task: {
                name: _compare_task(base["tasks"][task], model["tasks"][task])
                for name, model in models.items()
            }
            for task in base["tasks"]
        },
        "perplexity": {
            name: {
                **{key: model["perplexity"][key] for key in ("supervised", "all", "by_position")},
                "to_base": paired.compare_losses(
                    base["perplexity"]["conversations"], model["perplexity"]["conversations"]
                ),
            }
            for name, model in models.items()
        },
        "divergence": {name: model["divergence"] for name, model in models.items()},
        "health": {name: _count_health(model["health"]) for name, model in models.items()},
        "speed": {name: model["speed"] for name, model in models.items()},
    }


def _count_health(efforts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the health of chats by reasoning effort without what was said in them."""
    return {
        effort: {key: value for key, value in row.items() if key != "said"}
        for effort, row in efforts.items()
    }


def list_metrics(results: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest's metrics: accuracies, scores and flips by task and model; perplexities.

    `stderr` is that of `acc`; `paired_flips` counts items whose answer by `acc` became right
    (`gained`) or wrong (`lost`) relative to the base. Tasks without accuracy have `scores` alone.
    """
    return {
        "tasks": {
            task: {name: _list_task_metrics(row) for name, row in rows.items()}
            for task, rows in results["tasks"].items()
        },
        "perplexity": {
            name: row["supervised"]["perplexity"] for name, row in results["perplexity"].items()
        },
        "perplexity_all_tokens": {
            name: row["all"]["perplexity"] for name, row in results["perplexity"].items()
        },
        "health": results["health"],
        "divergence": {
            name: row["all"] if "all" in row else row
            for name, row in results["divergence"].items()
            if row is not None
        },
    }


def _list_task_metrics(row: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"items": row["items"], "scores": row["scores"]}
    if "acc" not in row:
        return found
    return found | {
        "acc": row["acc"],
        "acc_norm": row.get("acc_norm"),
        "stderr": row["acc_stderr"],
        "acc_norm_stderr": row.get("acc_norm_stderr"),
        "chance": row["chance"],
        "paired_flips": {key: row["acc_to_base"][key] for key in ("gained", "lost", "p")},
        "acc_difference": row["acc_to_base"]["difference"],
        "acc_difference_stderr": row["acc_to_base"]["stderr"],
    }


def summarize(results: dict[str, Any]) -> str:
    """Return one line per model, for a terminal."""
    lines = []
    for name, row in results["perplexity"].items():
        figures = [f"{name:<10} perplexity {row['supervised']['perplexity']:.3f}"]
        for task, rows in results["tasks"].items():
            figures += _summarize_task(task, rows[name], is_base=name == "base")
        lines.append(", ".join(figures))
    return "\n".join(lines)


def _summarize_task(task: str, row: dict[str, Any], is_base: bool) -> list[str]:
    figures = []
    if "acc" in row:
        figures.append((f"{task} {row['acc']:.1%} ± {row['acc_stderr']:.1%}", row["acc_to_base"]))
    for label, score in row["scores"].items():
        value = "none" if score["value"] is None else f"{score['value']:.3f}"
        figures.append((f"{task} {label} {value}", score["to_base"]))
    return [
        text if is_base or pair is None else f"{text} (flips +{pair['gained']} -{pair['lost']})"
        for text, pair in figures
    ]


def _compare_task(base: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    if base["requests_sha256"] != task["requests_sha256"]:
        raise ValueError("the models were asked different questions")
    figures = {key: value for key, value in task.items() if key not in _BY_ITEM}
    for metric, kept in (("acc", "right"), ("acc_norm", "right_norm")):
        if kept in task:
            figures[f"{metric}_to_base"] = paired.compare_answers(base[kept], task[kept])
    figures["scores"] = {
        label: _compare_score(base["scores"][label], score)
        for label, score in task["scores"].items()
    }
    return figures


def _compare_score(base: dict[str, Any], score: dict[str, Any]) -> dict[str, Any]:
    """Return a score with its difference from the base's, by item if it is a mean over items."""
    figures = {key: value for key, value in score.items() if key != "by_item"}
    both = base["by_item"], score["by_item"]
    figures["to_base"] = None if None in both else paired.compare_answers(*both)
    return figures
