"""Stage 03: loss, validation, mask updates, and what was trained on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from sparselong.report.elements import (
    Markup,
    Series,
    beside,
    chart,
    element,
    folded,
    is_number,
    join,
    linear_axis,
    note,
    pairs,
    show,
    show_anything,
    show_bytes,
    show_number,
    show_percent,
    step_axis,
    table,
)
from sparselong.report.source import FINETUNE, Run

_DRAWN = ("loss", "eval_loss", "eval_perplexity")
_TITLES = {
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
}
_NOT_CURVES = ("step", "epoch", "tokens", "mask_flipped_fraction")
_KNOWN = (
    *("steps", "train_loss", "eval_perplexity", "best_step", "best_eval_perplexity", "tokens"),
    *("tokens_per_second", "mask_updates", "two_four_conforming", "trainable_parameters"),
    *("supervised_token_fraction", "peak_host_bytes", "peak_device_bytes", "baked_eval_perplexity"),
    *("warnings", "metrics"),
)
_SUPERVISED = re.compile("⟦(.*?)⟧", re.DOTALL)
_MOST_CHARACTERS = 6000


def training(run: Run) -> list[Markup]:
    """Return the figures and curves of fine-tuning."""
    metrics = run.metrics(FINETUNE)
    best = metrics.get("best_step")
    lines = [] if best is None else [(float(best), f"best step: {best}")]
    rest = {key: value for key, value in metrics.items() if key not in _KNOWN}
    return [
        *(note(f"Warning: {each}.", kind="warning") for each in metrics.get("warnings", ())),
        pairs(_facts(metrics)),
        beside(
            _curve(run.rows, "loss", "Training loss", "nats per token", lines),
            _curve(run.rows, "eval_perplexity", "Validation perplexity", "perplexity", lines),
        ),
        *_masks(metrics.get("mask_updates", []), run.rows),
        folded("Evaluations", _evaluations(run.rows)),
        folded("Speed, gradients, and other figures by step", _others(run.rows)),
        *([folded("How it was computed", show_anything(rest))] if rest else []),
        *_conversations(run.supervision),
    ]


def _facts(metrics: Mapping[str, Any]) -> dict[str, str]:
    names = {
        "steps": "Steps",
        "tokens": "Tokens, without padding",
        "train_loss": "Last training loss",
        "best_step": "Best step",
        "best_eval_perplexity": "Best validation perplexity",
        "baked_eval_perplexity": "Validation perplexity after rounding the experts",
        "tokens_per_second": "Tokens per second, median",
        "trainable_parameters": "Trainable parameters",
    }
    facts = {title: show(metrics[key]) for key, title in names.items() if key in metrics}
    for key, title in (
        ("supervised_token_fraction", "Supervised tokens"),
        ("two_four_conforming", "Groups of four that are 2:4 at the end"),
    ):
        if is_number(metrics.get(key)):
            facts[title] = show_percent(metrics[key])
    return facts


def _points(rows: Iterable[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in rows if is_number(row.get(key))]


def _curve(
    rows: list[dict[str, Any]],
    key: str,
    title: str,
    label: str,
    lines: list[tuple[float, str]],
    is_low: bool = False,
) -> Markup:
    """Return one figure of metrics.jsonl by step."""
    points = _points(rows, key)
    if not points:
        return note(f"{title}: no figures in metrics.jsonl.")
    x = step_axis(step for step, _ in _all_steps(rows))
    series = Series(title, points, "second" if key.startswith("eval") else "first",
                    has_dots=len(points) <= 40)  # fmt: skip
    y = linear_axis((value for _, value in points), most=4 if is_low else 5)
    shown = [line for line in lines if x.low <= line[0] <= x.high]
    return chart([series], (x, y), ("step", label), title, lines=shown, is_low=is_low)


def _all_steps(rows: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Return the first and last step, so that all charts have one axis."""
    steps = [row["step"] for row in rows]
    return [(min(steps), 0.0), (max(steps), 0.0)]


def _masks(updates: list[Mapping[str, Any]], rows: list[dict[str, Any]]) -> list[Markup]:
    """Return the fraction of mask bits that each update flipped, as columns and a table."""
    if not updates:
        return [note("Masks were not updated.")]
    points = [(update["step"], 100 * update["flipped"]) for update in updates]
    steps = [step for step, _ in points] + [row["step"] for row in rows]
    axes = (step_axis(steps), linear_axis((y for _, y in points), most=4, from_zero=True))
    series = Series("bits flipped", points, "third", is_columns=True)
    drawn = chart([series], axes, ("step", "% of bits flipped"), "Mask updates", is_low=True)
    kinds = list(dict.fromkeys(kind for u in updates for kind in u.get("flipped_by_kind", {})))
    body = [
        [
            update["step"],
            show_percent(update["flipped"], 3),
            *(show_percent(update.get("flipped_by_kind", {}).get(kind), 3) for kind in kinds),
        ]
        for update in updates
    ]
    return [drawn, folded("Mask updates by step", table(["step", "bits flipped", *kinds], body))]


def _evaluations(rows: list[dict[str, Any]]) -> Markup:
    """Return each evaluation with its loss, and the figures of the user's function."""
    rows = [row for row in rows if "eval_loss" in row]
    own = [row["metrics"] if isinstance(row.get("metrics"), dict) else {} for row in rows]
    names = list(dict.fromkeys(name for figures in own for name in figures))
    body = [
        [
            row["step"],
            *(show_number(row.get(key)) for key in ("eval_loss", "eval_perplexity")),
            *(show_number(figures.get(name)) for name in names),
        ]
        for row, figures in zip(rows, own, strict=True)
    ]
    return table(["step", "validation loss", "perplexity", *names], body)


def _others(rows: list[dict[str, Any]]) -> list[Markup]:
    """Return a curve of every other figure in metrics.jsonl, and the highest memory."""
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if is_number(value))
    peaks = [key for key in keys if "bytes" in key.split("_")]
    left_out = {*_DRAWN, *_NOT_CURVES, *peaks}
    curves = [
        _curve(rows, key, _TITLES.get(key, key), key.replace("_", " "), [], is_low=True)
        for key in keys
        if key not in left_out
    ]
    highest = {
        key.removeprefix("peak_bytes_"): show_bytes(max(value for _, value in _points(rows, key)))
        for key in peaks
    }
    return [
        beside(*curves),
        pairs({f"Peak memory, {device}": size for device, size in highest.items()}),
    ]


def _conversations(text: str) -> list[Markup]:
    """Return conversations as they were trained on, with supervised tokens marked."""
    if not text:
        return []
    more = len(text) - _MOST_CHARACTERS
    parts = _SUPERVISED.split(text[:_MOST_CHARACTERS])
    marked = [element("mark", part) if index % 2 else part for index, part in enumerate(parts)]
    end = f" … ({more:,} more characters in supervision.txt)" if more > 0 else ""
    shown = element("pre", join([*marked, end]), class_="said", dir="auto")
    return [folded("Conversations as they were trained on (marked: supervised)", shown)]
