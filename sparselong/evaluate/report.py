"""Comparison of the three models: results.json, report.md, evaluation.png, manifest metrics.

The base is the reference: every other figure is shown with its difference from the base under the
same settings and the standard error of that difference. Leaderboard figures of the base were
measured with other settings and are not shown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparselong.config import Config
from sparselong.evaluate import paired

_BY_ITEM = ("right", "right_norm", "log_likelihoods")
"""What `<model>.json` holds for each item of a task, and the report leaves out."""
_COLOURS = {"base": "#4c72b0", "compressed": "#dd8452", "finetuned": "#55a868"}


def build_results(
    config: Config, models: dict[str, dict[str, Any]], warnings: list[str]
) -> dict[str, Any]:
    """Return all measurements and comparisons.

    Args:
        config: the run's config.
        models: results of `models.measure` by name; `base` is the reference.
        warnings: shown at the top of the report.

    Returns:
        {settings, warnings, tasks: task → model → figures, perplexity: model → figures}.

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
    }


def list_metrics(results: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest's metrics: accuracies and flips by task and model, and perplexities.

    `stderr` is that of `acc`; `paired_flips` counts items whose answer by `acc` became right
    (`gained`) or wrong (`lost`) relative to the base.
    """
    return {
        "tasks": {
            task: {
                name: {
                    "acc": row["acc"],
                    "acc_norm": row.get("acc_norm"),
                    "stderr": row["acc_stderr"],
                    "acc_norm_stderr": row.get("acc_norm_stderr"),
                    "chance": row["chance"],
                    "items": row["items"],
                    "paired_flips": {
                        key: row["acc_to_base"][key] for key in ("gained", "lost", "p")
                    },
                    "acc_difference": row["acc_to_base"]["difference"],
                    "acc_difference_stderr": row["acc_to_base"]["stderr"],
                }
                for name, row in rows.items()
            }
            for task, rows in results["tasks"].items()
        },
        "perplexity": {
            name: row["supervised"]["perplexity"] for name, row in results["perplexity"].items()
        },
        "perplexity_all_tokens": {
            name: row["all"]["perplexity"] for name, row in results["perplexity"].items()
        },
    }


def summarize(results: dict[str, Any]) -> str:
    """Return one line per model, for a terminal."""
    lines = []
    for name, row in results["perplexity"].items():
        figures = [f"{name:<10} perplexity {row['supervised']['perplexity']:.3f}"]
        for task, rows in results["tasks"].items():
            task_row, pair = rows[name], rows[name]["acc_to_base"]
            figures.append(f"{task} {task_row['acc']:.1%} ± {task_row['acc_stderr']:.1%}")
            if name != "base":
                figures[-1] += f" (flips +{pair['gained']} -{pair['lost']})"
        lines.append(", ".join(figures))
    return "\n".join(lines)


def render(results: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    settings = results["settings"]
    lines = ["# Evaluation", ""]
    lines += [f"> **Warning:** {warning}\n" for warning in results["warnings"]]
    lines += [
        "All models were measured in the same way. Differences are relative to the base, on the",
        "same items and tokens; ± gives the standard error of the paired difference. Published",
        "figures use other settings: compare differences, not absolute values.",
        "",
    ]
    for task, rows in results["tasks"].items():
        lines += _render_task(task, rows, settings["num_fewshot"])
    lines += _render_perplexity(results["perplexity"], settings)
    return "\n".join([*lines, "![Accuracy and perplexity by position](evaluation.png)", ""])


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw accuracy bars with standard errors, and perplexity by position, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    bars, curves = figure.subplots(1, 2)
    groups = [(task, rows, "acc") for task, rows in results["tasks"].items()]
    groups += [(task, rows, "acc_norm") for task, rows, _ in groups if "acc_norm" in rows["base"]]
    names = list(results["perplexity"])
    for offset, name in enumerate(names):
        places = [group + (offset - (len(names) - 1) / 2) * 0.26 for group in range(len(groups))]
        heights = [rows[name][metric] for _, rows, metric in groups]
        errors = [rows[name][f"{metric}_stderr"] for _, rows, metric in groups]
        colour = _COLOURS.get(name)
        bars.bar(places, heights, 0.24, yerr=errors, capsize=3, label=name, color=colour)
        points = results["perplexity"][name]["by_position"]
        middles = [(point["first"] * (point["last"] + 1)) ** 0.5 for point in points]
        heights = [point["perplexity"] for point in points]
        curves.plot(middles, heights, marker="o", label=name, color=colour)
    for group, (_, rows, _) in enumerate(groups):
        chance = rows["base"]["chance"]
        bars.hlines(chance, group - 0.45, group + 0.45, color="grey", linestyles="dotted")
    bars.set_xticks(range(len(groups)), [f"{task}\n{metric}" for task, _, metric in groups])
    bars.set(ylabel="accuracy (error bars: ± 1 stderr, dotted: chance)")
    curves.set_xscale("log", base=2)
    curves.set(xlabel="tokens of context before the token", ylabel="perplexity, supervised tokens")
    curves.legend()
    FigureCanvasAgg(figure).print_png(path)


def _compare_task(base: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    if base["requests_sha256"] != task["requests_sha256"]:
        raise ValueError("the models were asked different questions")
    figures = {key: value for key, value in task.items() if key not in _BY_ITEM}
    figures["acc_to_base"] = paired.compare_answers(base["right"], task["right"])
    if "right_norm" in task:
        figures["acc_norm_to_base"] = paired.compare_answers(base["right_norm"], task["right_norm"])
    return figures


def _render_task(task: str, rows: dict[str, Any], num_fewshot: int) -> list[str]:
    first = rows["base"]
    lines = [
        f"## {task}",
        "",
        f"{first['items']} items, {num_fewshot}-shot, chance {first['chance']:.1%}. Flips: items "
        "that became right / wrong relative to the base, with McNemar's exact p.",
        "",
        "| model | acc | to base | flips | p | acc_norm | to base | flips | p |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = [name]
        for metric in ("acc", "acc_norm"):
            cells += _accuracy_cells(row, metric, is_base=name == "base")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _accuracy_cells(row: dict[str, Any], metric: str, is_base: bool) -> list[str]:
    if metric not in row:
        return ["–"] * 4
    accuracy = f"{row[metric]:.2%} ± {row[f'{metric}_stderr']:.2%}"
    if is_base:
        return [accuracy, "", "", ""]
    pair = row[f"{metric}_to_base"]
    difference = f"{100 * pair['difference']:+.2f} ± {100 * pair['stderr']:.2f} points"
    return [accuracy, difference, f"+{pair['gained']} / −{pair['lost']}", f"{pair['p']:.3f}"]


def _render_perplexity(rows: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    supervised = rows["base"]["supervised"]["tokens"]
    lines = [
        "## Perplexity on held-out conversations",
        "",
        f"{settings['conversations']} conversations cut at {settings['sequence_len']:,} tokens; "
        f"{supervised:,} supervised tokens (train_on: {settings['train_on']}), "
        f"{rows['base']['all']['tokens']:,} in all.",
        "",
        "| model | supervised | ratio to base | nats per token | all tokens |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        pair = row["to_base"]
        change = ["", ""]
        if name != "base":
            difference = f"{pair['difference']:+.4f} ± {pair['stderr']:.4f}"
            change = [f"× {pair['ratio']:.4f}", difference]
        both = [f"{row[tokens]['perplexity']:.3f}" for tokens in ("supervised", "all")]
        lines.append(f"| {' | '.join([name, both[0], *change, both[1]])} |")
    lines += [
        "",
        "### By position",
        "",
        f"| context tokens | tokens measured | {' | '.join(rows)} |",
        "|" + "---|" * (2 + len(rows)),
    ]
    for points in zip(*(row["by_position"] for row in rows.values()), strict=True):
        where = f"{points[0]['first']:,}–{points[0]['last']:,} | {points[0]['tokens']:,}"
        cells = " | ".join(f"{point['perplexity']:.3f}" for point in points)
        lines.append(f"| {where} | {cells} |")
    return [*lines, ""]
