"""Look up a figure at its source: a row of a result file, or arithmetic of the planner.

A source is a document of one of these forms:

    {"file", "case", "metric", "backend"?}   the one row of benchmarks/results/FILE that matches;
                                             `case` has enough keys to identify it
    {..., "setting"}                         a key of such a row's case, instead of its value
    {"file", "largest"}                      the largest absolute value of a metric
    {"stored", "part", "bits"?}              bytes of a published model's weights on disk
    {"plan", "set"?, "what"?}                a value that the memory planner gives for a config file
    {"config", "key"}                        a setting of a shipped config file
    {"shape", "field"}                       a size of a published model
    {"code"}                                 a constant of the package, as module:NAME
    {"ratio": [a, b]}, {"sum": [a, b, ...]}, {"product": [a, b, ...]}, {"constant"}

promises.json and tests/readme_figures.json give such a source for every published figure.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from benchmarks.record import RESULTS
from sparselong import config, memory
from sparselong.memory import training

ROOT = RESULTS.parent.parent
Source = dict[str, Any]
_PER_UNIT = {
    ("bytes", "GiB"): 2**30,
    ("bytes", "MiB"): 2**20,
    ("bytes", "GB"): 1e9,
    ("1", "%"): 0.01,
    ("s", "ms"): 1e-3,
    ("s", "min"): 60,
}
"""Size of the shown unit in stored units; other pairs are not converted."""


def look_up(source: Source, unit: str) -> float:
    """Return the value of a source in the unit in which it is shown.

    Raises:
        ValueError: no row matches, or several do.
    """
    value, stored = _find(source)
    return value / _PER_UNIT.get((stored, unit), 1)


def is_shown(text: str, value: float) -> bool:
    """Return whether a printed number is the value, rounded to the printed decimals."""
    number = float(text.replace(",", ""))
    decimals = len(text.partition(".")[2])
    return math.isclose(round(value, decimals), number, abs_tol=10.0**-decimals / 100)


def group_by_case(document: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return a result file's figures by metric, for each case as JSON."""
    cases: dict[str, dict[str, float]] = {}
    for entry in document["rows"]:
        cases.setdefault(json.dumps(entry["case"]), {})[entry["metric"]] = entry["value"]
    return cases


def name_machine(source: Source) -> str:
    """Return the machine that a source's rows were measured on, or `arithmetic`."""
    for parts in (source.get(key) for key in ("ratio", "sum", "product")):
        if parts:
            return next((m for m in map(name_machine, parts) if m != "arithmetic"), "arithmetic")
    if "file" not in source:
        return "arithmetic"
    machine, gpus = read_result(source["file"])["machine"], _gpus_used(source)
    if not machine["gpus"]:
        return f"{machine['cpu_count']} CPU cores"
    return f"{gpus} × {machine['gpus'][0].split(',')[0].removeprefix('NVIDIA ')}"


@cache
def read_result(name: str) -> dict[str, Any]:
    """Return the document of a file in benchmarks/results."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _gpus_used(source: Source) -> int:
    """Return a case's number of GPUs: `gpus` or `degree`, or one for single-GPU benchmarks."""
    case = source["case"]
    return case.get("gpus", case.get("degree", 1))


def _find(source: Source) -> tuple[float, str]:
    """Return a source's value and the unit in which it is stored."""
    if "largest" in source:
        rows = [r for r in read_result(source["file"])["rows"] if r["metric"] == source["largest"]]
        return max(abs(row["value"]) for row in rows), rows[0]["unit"]
    if "file" in source:
        row = find_row(source)
        if "setting" in source:
            return row["case"][source["setting"]], "1"
        return row["value"], row["unit"]
    if "ratio" in source:
        above, below = (_find(part)[0] for part in source["ratio"])
        return above / below, "1"
    if "sum" in source:
        parts = [_find(part) for part in source["sum"]]
        return sum(value for value, _ in parts), parts[0][1]
    if "product" in source:
        parts = [_find(part) for part in source["product"]]
        return math.prod(value for value, _ in parts), parts[0][1]
    if "stored" in source:
        return _stored_bytes(source), "bytes"
    if "plan" in source:
        return _planned(source)
    if "config" in source:
        return _setting(source), "1"
    if "shape" in source:
        return getattr(memory.PUBLISHED[f"openai/gpt-oss-{source['shape']}"], source["field"]), "1"
    if "code" in source:
        module, _, name = source["code"].partition(":")
        return getattr(importlib.import_module(module), name), source.get("unit", "1")
    return source["constant"], source.get("unit", "1")


def find_row(source: Source) -> dict[str, Any]:
    """Return the one row that a source identifies.

    Raises:
        ValueError: no row matches, or several do.
    """
    case = source.get("case", {})
    found = [
        row
        for row in read_result(source["file"])["rows"]
        if row["metric"] == source["metric"]
        and row["backend"] == source.get("backend", row["backend"])
        and all(key in row["case"] and row["case"][key] == value for key, value in case.items())
    ]
    if len(found) != 1:
        raise ValueError(f"{len(found)} rows match {source}; expected one")
    return found[0]


def _stored_bytes(source: Source) -> float:
    """Return bytes of a part of a published model: one group of weights, or `total`."""
    shape = memory.PUBLISHED[f"openai/gpt-oss-{source['stored']}"]
    weights = {
        "experts": shape.expert_weights,
        "attention": shape.attention_weights,
        "embedding and lm_head": 2 * shape.embedding,
        "small": shape.small,
        "total": shape.total,
    }[source["part"]]
    return weights * source.get("bits", 8) / 8


def _load(source: Source, name: str) -> config.Config:
    return config.load(ROOT / "configs" / source[name], source.get("set", []))


def _planned(source: Source) -> tuple[float, str]:
    """Return a value of the memory plan, with its unit.

    `what` is `peak` (of stage 03 as the planner chooses), `replicated` or `sharded` (of stage 03
    with experts and vocabulary held so), `model` (the compressed model on disk), or a key of
    `bits_per_weight`.
    """
    asked = _load(source, "plan")
    if "kept" in source:
        shape = memory.find_shape(asked.model)
        kept = memory.Kept(*source["kept"])
        return training.finetune_memory(shape, asked, kept=kept).peak_bytes, "bytes"
    plan, what = memory.make_plan(asked), source.get("what", "peak")
    if what == "peak":
        return plan.memory.peak_bytes, "bytes"
    if what == "replicated":
        return plan.replicated.peak_bytes, "bytes"
    if what == "sharded":
        assert plan.sharded is not None
        return plan.sharded.peak_bytes, "bytes"
    if what == "model":
        return sum(plan.compressed.values()), "bytes"
    return plan.bits_per_weight[what], "1"


def _setting(source: Source) -> float:
    value: Any = _load(source, "config")
    for part in source["key"].split("."):
        value = getattr(value, part)
    return value


FIGURE = re.compile(
    r"(?<![\w.,@^-])(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?)(?!\d*\.\d)"
    r"(?:×|(?: |-)?(?P<unit>tokens/s|tok/s|GiB|GB|MiB|MB|KiB|TB|bits?|%|ms|µs|min|s|h|K|B|nats"
    r"|times|points)(?![\w/]))?"
)
"""A number and, if present, its unit."""


def find_figures(text: str) -> list[re.Match[str]]:
    """Return the figures in a text: numbers with a unit, a decimal point or a thousands comma."""
    return [
        match
        for match in FIGURE.finditer(text)
        if match.group() != match["number"] or "." in match["number"] or "," in match["number"]
    ]
