"""The report as Markdown."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from sparselong.evaluate.health import LOOP_PERIOD, LOOP_TOKENS
from sparselong.evaluate.report.ruler import split_ruler


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
    drawn, others = split_ruler(results["tasks"])
    for task, rows in others.items():
        lines += _render_task(task, rows, settings["num_fewshot"])
    lines += _render_ruler(drawn)
    lines += _render_perplexity(results["perplexity"], settings)
    lines += _render_divergence(results["divergence"])
    lines += _render_health(results["health"], settings["health_tokens"])
    lines += _render_speed(results["speed"])
    return "\n".join([*lines, "![Accuracy and perplexity by position](evaluation.png)", ""])


def _render_task(task: str, rows: dict[str, Any], num_fewshot: int) -> list[str]:
    first = rows["base"]
    chance = f", chance {first['chance']:.1%}" if "chance" in first else ""
    lines = [
        f"## {task}",
        "",
        f"{first['items']} items, {num_fewshot}-shot{chance}. Flips: items that became right / "
        "wrong (better / worse) relative to the base, with McNemar's exact p.",
        "",
    ]
    if "acc" in first:
        lines += [
            "| model | acc | to base | flips | p | acc_norm | to base | flips | p |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for name, row in rows.items():
            cells = [name]
            for metric in ("acc", "acc_norm"):
                cells += _accuracy_cells(row, metric, is_base=name == "base")
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    if first["scores"]:
        lines += ["| model | metric | value | to base | flips | p |", "|---|---|---|---|---|---|"]
        for label, base in first["scores"].items():
            for name, row in rows.items():
                cells = _score_cells(row["scores"][label], base, is_base=name == "base")
                lines.append(f"| {' | '.join([name, label, *cells])} |")
        lines.append("")
    return lines


def _score_cells(score: dict[str, Any], base: dict[str, Any], is_base: bool) -> list[str]:
    value, stderr, pair = score["value"], score["stderr"], score["to_base"]
    shown = "none" if value is None else f"{value:.4f}"
    shown += "" if stderr is None else f" ± {stderr:.4f}"
    if is_base:
        return [shown, "", "", ""]
    if pair is not None:
        difference = f"{pair['difference']:+.4f} ± {pair['stderr']:.4f}"
        return [shown, difference, f"+{pair['gained']} / −{pair['lost']}", f"{pair['p']:.3f}"]
    if value is None or base["value"] is None:
        return [shown, "–", "–", "–"]
    return [shown, f"{value - base['value']:+.4f}", "–", "–"]


def _render_ruler(tasks: dict[tuple[str, int], dict[str, Any]]) -> list[str]:
    """Return a table for each of RULER's tasks, with a column for each length."""
    lines: list[str] = []
    if tasks:
        lines += [
            "## RULER",
            "",
            "Share of the wanted texts that an answer contains, by the context that prompt and "
            "answer fill, in tokens; in brackets the items that became better / worse than the "
            "base's.",
            "",
        ]
    for task, group in groupby(tasks.items(), key=lambda each: each[0][0]):
        columns = {length: rows for (_, length), rows in group}
        first = next(iter(columns.values()))
        head = " | ".join(f"{length:,}" for length in columns)
        lines += [f"| {task} | {head} |", "|---|" + "---|" * len(columns)]
        for name in first:
            cells = [_ruler_cell(rows[name], is_base=name == "base") for rows in columns.values()]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines += ["", f"{first['base']['items']} items of each length.", ""]
    return lines


def _ruler_cell(row: dict[str, Any], is_base: bool) -> str:
    score = row["scores"]["score"]
    pair = score["to_base"]
    shown = f"{score['value']:.1%} ± {score['stderr']:.1%}"
    return shown if is_base else f"{shown} (+{pair['gained']} / −{pair['lost']})"


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
            difference = f"{pair['difference']:+.4f}"
            if pair["stderr"] is not None:
                difference += f" ± {pair['stderr']:.4f}"
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


def _render_divergence(rows: dict[str, Any]) -> list[str]:
    """Return how far models are from the base, on the whole and by position."""
    left_out = [name for name, row in rows.items() if row is not None and "left_out" in row]
    found = {name: row for name, row in rows.items() if row is not None and name not in left_out}
    lines = ["## Divergence from the base", ""] if found or left_out else []
    lines += [f"{name} is not compared: {rows[name]['left_out']}.\n" for name in left_out]
    if not found:
        return lines
    first = next(iter(found.values()))
    lines += [
        f"On the tokens of {first['conversations']} of these conversations, each with the text "
        "before it: Kullback-Leibler divergence of the next token from the base's, in nats, and "
        "how often the most likely tokens agree.",
        "",
        f"| context tokens | tokens compared | {' | '.join(found)} |",
        "|" + "---|" * (2 + len(found)),
    ]
    for label, key in (("all", "all"), ("supervised", "supervised")):
        cells = " | ".join(_divergence_cell(row[key]) for row in found.values())
        lines.append(f"| {label} | {first[key]['tokens']:,} | {cells} |")
    for points in zip(*(row["by_position"] for row in found.values()), strict=True):
        where = f"{points[0]['first']:,}–{points[0]['last']:,} | {points[0]['tokens']:,}"
        lines.append(f"| {where} | {' | '.join(map(_divergence_cell, points))} |")
    return [*lines, ""]


def _divergence_cell(figures: dict[str, Any]) -> str:
    if figures["kl"] is None:
        return "–"
    return f"{figures['kl']:.4f}, {figures['agreement']:.1%}"


def _render_health(rows: dict[str, Any], most_tokens: int) -> list[str]:
    """Return how answers in a chat ended, and how long they were."""
    if not any(rows.values()):
        return []
    lines = [
        "## Answers in a chat",
        "",
        f"Fixed questions with each reasoning effort, at most {most_tokens:,} tokens each. Ended: "
        "with a token that ends the turn. Looped: a piece of at most "
        f"{LOOP_PERIOD} tokens stands four times in succession, in at least {LOOP_TOKENS} tokens. "
        "Malformed: not in harmony, as the last column says. These are counts, not verdicts.",
        "",
        "| model | effort | answers | ended | looped | malformed | without final text "
        "| tokens: mean, median, most | repairs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, efforts in rows.items():
        for effort, row in efforts.items():
            tokens = row["tokens"]
            cells = [
                *(name, effort, row["answers"], row["ended"], row["looped"], row["malformed"]),
                row["no_final"],
                f"{tokens['mean']:.0f}, {tokens['median']:.0f}, {tokens['most']}",
                ", ".join(f"{kind} {count}" for kind, count in row["repairs"].items()) or "–",
            ]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return [*lines, ""]


def _render_speed(rows: dict[str, Any]) -> list[str]:
    """Return how fast models were loaded, and prompts read and continued."""
    lines = [
        "## Speed",
        "",
        "Of one process, one prompt at a time. A prompt's own speed is up to its first token, and "
        "that of its answer from there on. Neither says anything about quality.",
        "",
        "| model | loaded in | prompt | prompts | first token | prompt tokens/s | tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        loaded = f"{row['load_seconds']:.1f} s"
        if not row["prompts"]:
            lines.append(f"| {name} | {loaded} | – | 0 | – | – | – |")
        for group in row["prompts"]:
            later = group["tokens_per_second"]
            cells = [
                *(name, loaded, f"≤ {group['up_to_tokens']:,} tokens", f"{group['prompts']:,}"),
                f"{group['first_token_seconds']:.2f} s",
                f"{group['prompt_tokens_per_second']:,.0f}",
                "–" if later is None else f"{later:,.1f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]
