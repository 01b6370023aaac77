"""Plot training loss, validation perplexity, mask updates and the best step (loss.png)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw(
    rows: Sequence[Mapping[str, Any]],
    mask_updates: Sequence[Mapping[str, Any]],
    best_step: int,
    path: Path,
) -> None:
    """Plot metrics.jsonl's rows to a PNG file.

    Args:
        rows: training and evaluation rows, by step.
        mask_updates: `step` and `flipped` (fraction of bits) of each update.
        best_step: step of the best checkpoint.
        path: path of the PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    left, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    held_out = [(row["step"], row["eval_perplexity"]) for row in rows if "eval_perplexity" in row]
    left.plot(*_columns(train), color="tab:blue", linewidth=1, label="training loss")
    left.set_ylabel("training loss (nats per token)", color="tab:blue")
    right = left.twinx()
    right.plot(*_columns(held_out), "o-", color="tab:orange", label="perplexity")
    right.set_ylabel("validation perplexity", color="tab:orange")
    left.axvline(best_step, color="tab:green", linestyle="--", label=f"best: step {best_step}")
    for axis in (left, below):
        for update in mask_updates:
            axis.axvline(update["step"], color="0.85", linewidth=0.8, zorder=0)
    steps = [update["step"] for update in mask_updates]
    flips = [100 * update["flipped"] for update in mask_updates]
    below.bar(steps, flips, color="0.4", width=max([0.6, *(0.004 * x for x, _ in train[-1:])]))
    below.set_ylabel("bits flipped, %")
    below.set_xlabel("step (grey lines: mask updates)")
    left.legend(loc="upper right")
    figure.savefig(path, dpi=120)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Return the x and y values of points; both are empty if metrics.jsonl was lost."""
    return [x for x, _ in points], [y for _, y in points]
