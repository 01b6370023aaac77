"""Plot a sweep: validation curves of its runs, and the lowest perplexity of each (sweep.png)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

PLOT = "sweep.png"


def draw(curves: Mapping[str, Mapping[int, float]], path: Path) -> None:
    """Plot the validation perplexity of each run.

    Args:
        curves: validation perplexity by step, by name of the run.
        path: path of the PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = max(4.0, 0.35 * len(curves) + 1.5)
    figure = Figure(figsize=(12, height), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, curve in curves.items():
        (line,) = left.plot(list(curve), list(curve.values()), "o-", markersize=3, linewidth=1)
        lowest = min(curve.values())
        right.plot([lowest], [name], "o", color=line.get_color())
        right.annotate(f" {lowest:.4g}", (lowest, name), va="center", fontsize=8)
    left.set_xlabel("step")
    left.set_ylabel("validation perplexity")
    right.set_xlabel("lowest validation perplexity")
    right.invert_yaxis()
    right.margins(x=0.25)
    right.grid(axis="x", color="0.9")
    figure.savefig(path, dpi=120)
