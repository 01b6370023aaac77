"""The head of the page: what came out, in a few figures, and how far the run is."""

from __future__ import annotations

import datetime
from typing import Any

from sparselong.report.elements import (
    MISSING,
    Child,
    Markup,
    element,
    is_number,
    note,
    show_bytes,
    show_number,
    show_percent,
    show_seconds,
    table,
)
from sparselong.report.source import COMPRESS, EVAL, EXPORT, FINETUNE, HEALTH, Run

_STAGES = (HEALTH, COMPRESS, FINETUNE, EVAL, EXPORT)


def overview(run: Run, figures: list[Markup]) -> Markup:
    """Return the page's head: title, problems, and what `summary` returns."""
    problems = [note(problem, kind="warning") for problem in run.problems]
    title = [element("p", "Sparse-Long run", class_="kind"), element("h1", run.name)]
    return element("header", title, problems, figures)


def summary(run: Run) -> list[Markup]:
    """Return the run's models, figures and stages."""
    model = str(run.config.get("model", {}).get("base", MISSING))
    name = run.metrics(COMPRESS).get("name")
    what = [f"Base model: {model}", f"compressed as {name}" if name else None]
    return [
        element("p", " · ".join(filter(None, what)), class_="lead"),
        element("div", _cards(run), class_="cards"),
        _stages(run),
    ]


def _cards(run: Run) -> list[Markup]:
    """Return the few figures by which a run is known, as far as it has them."""
    cards = [_size(run), _perplexity(run), *_tasks(run)]
    seconds = [manifest["seconds"] for manifest in run.manifests.values()]
    cards.append(_card("Time", show_seconds(sum(seconds)), "of all finished stages"))
    peaks = [
        (count, device, name)
        for name, manifest in run.manifests.items()
        for device, count in manifest.get("peak_bytes", {}).items()
    ]
    for title, wanted in (("Peak GPU memory", False), ("Peak host memory", True)):
        found = [peak for peak in peaks if (peak[1] == "host") is wanted]
        if found:
            count, device, stage = max(found)
            where = f"in {stage}" if wanted else f"on {device} in {stage}"
            cards.append(_card(title, show_bytes(count), where))
    return [card for card in cards if card is not None]


def _card(title: str, value: str, *context: Child) -> Markup:
    parts = [element("div", title, class_="title"), element("div", value, class_="figure")]
    return element("div", parts, element("div", context, class_="context"), class_="card")


def _size(run: Run) -> Markup | None:
    metrics = run.metrics(COMPRESS)
    size, base = metrics.get("bytes_on_disk"), metrics.get("base_bytes_on_disk")
    if not size or not base:
        return None
    return _card("Size", show_bytes(size), f"{show_percent(size / base)} of {show_bytes(base)}")


def _perplexity(run: Run) -> Markup | None:
    """Return the last model's perplexity, or that of training if stage 04 is not done."""
    found: dict[str, Any] = run.metrics(EVAL).get("perplexity", {})
    if {"base", "compressed", "finetuned"} <= found.keys():
        before = f"base {show_number(found['base'])}, compressed {show_number(found['compressed'])}"
        return _card("Perplexity", show_number(found["finetuned"]), before)
    best = run.metrics(FINETUNE).get("best_eval_perplexity")
    return _card("Perplexity", show_number(best), "in training, best") if best else None


def _tasks(run: Run) -> list[Markup]:
    """Return the accuracy of each task, up to two."""
    cards = []
    for task, rows in list(run.metrics(EVAL).get("tasks", {}).items())[:2]:
        row, base = rows.get("finetuned", {}), rows.get("base", {})
        if is_number(row.get("acc")) and is_number(base.get("acc")):
            value = show_percent(row["acc"])
            error = f" ± {show_percent(row['stderr'])}" if is_number(row.get("stderr")) else ""
            cards.append(_card(task, value, f"{error.strip()}; base {show_percent(base['acc'])}"))
    return cards


def _stages(run: Run) -> Markup:
    """Return each stage with its duration and peak memory, or that it is not done."""
    rows = []
    for stage in _STAGES:
        names = [name for name in run.manifests if name.partition("/")[0] == stage]
        rows += [_stage_row(run, name) for name in names]
        if not names:
            rows.append([stage, *[MISSING] * 3, element("span", "not done", class_="aside")])
    return table(["stage", "time", "peak host memory", "peak GPU memory", "done"], rows)


def _stage_row(run: Run, name: str) -> list[Child]:
    manifest = run.manifests[name]
    peaks = dict(manifest.get("peak_bytes", {}))
    host = show_bytes(peaks.pop("host", None))
    gpu = show_bytes(max(peaks.values(), default=None))
    written = (run.directory / name / "manifest.json").stat().st_mtime
    when = datetime.datetime.fromtimestamp(written).astimezone().strftime("%Y-%m-%d %H:%M")
    return [name, show_seconds(manifest["seconds"]), host, gpu, when]
