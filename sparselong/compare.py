"""`python -m sparselong.compare RUN RUN …`: what differs between runs, in config and in results.

A figure is compared only as far as it was measured on the same: each has a basis, such as the
hashes of its data or of a task's requests. If the bases of two runs differ, the figures are still
shown, but their row is marked and a note says what differs. Markdown goes to stdout, with `--json`
one JSON document with exact values. Reads the run directories only.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sparselong.config import leaves
from sparselong.errors import ConfigError, ExpectedError, StageError
from sparselong.figures import format_bytes, format_seconds
from sparselong.files import read_json, why_unusable
from sparselong.provenance import find_change
from sparselong.registration import begin_program
from sparselong.run import config_of, find_outdated, read_finished

_COMPRESS, _FINETUNE, _EVAL, _EXPORT = "02_compress", "03_finetune", "04_eval", "05_export"
_MISSING = "–"
_FORMATS = {
    "bytes": format_bytes,
    "seconds": format_seconds,
    "fraction": lambda value: f"{100 * value:.2f} %",
}
_NOT_RESULTS = frozenset({"stderr", "chance", "items", "p"})
"""Keys of a task's metrics that are about its figures."""
_TO_BASE = ("acc_difference", "paired_flips", "to_base")
"""What keys of differences to the base contain."""
Basis = Mapping[str, Any]
"""What a figure depends on beside the run's config, by name."""


@dataclass(frozen=True)
class Run:
    """A run: its directory as given, manifests, config, and stage 04's results."""

    name: str
    manifests: dict[str, dict[str, Any]]
    config: dict[str, Any]
    results: dict[str, Any]

    def metrics(self, stage: str) -> dict[str, Any]:
        """Return a stage's metrics; empty if it is not done."""
        return self.manifests.get(stage, {}).get("metrics", {})


class _Measured(NamedTuple):
    """A figure of one run."""

    group: str
    name: str
    unit: str
    value: Any
    basis: Basis
    stderr: float | None = None


@dataclass
class Figure:
    """A figure of several runs.

    Attributes:
        group: heading of its table.
        name: what it is.
        unit: a key of _FORMATS, or empty.
        values: exact values by run.
        stderrs: standard errors by run, as far as there are any.
        bases: what the figure depends on, by run.
    """

    group: str
    name: str
    unit: str
    values: dict[str, float] = field(default_factory=dict)
    stderrs: dict[str, float] = field(default_factory=dict)
    bases: list[Basis] = field(default_factory=list)

    @property
    def differs_in(self) -> list[str]:
        """Names of what the figure depends on and the runs do not have in common."""
        names = dict.fromkeys(name for basis in self.bases for name in basis)
        first = self.bases[0]
        return [name for name in names if any(b.get(name) != first.get(name) for b in self.bases)]


def compare(directories: Sequence[Path]) -> dict[str, Any]:
    """Return what differs between runs, as JSON.

    Args:
        directories: of the runs, each once.

    Returns:
        `runs`, `config` (values by key and run, of keys that differ), `results` (group, name, unit,
        values and stderrs by run, and what the bases of the figures `differs_in`), `notes`.

    Raises:
        ConfigError: fewer than two runs, or one of them twice.
        StageError: a run has no finished stage, or a file of it is damaged.
    """
    if len(directories) < 2 or len({path.resolve() for path in directories}) < len(directories):
        raise ConfigError(
            "runs cannot be compared",
            "two or more directories of different runs",
            ", ".join(map(str, directories)) or "none",
            "pass them as in: python -m sparselong.compare runs/ONE runs/TWO",
        )
    runs = [_open(path) for path in directories]
    figures = _collect(runs)
    return {
        "runs": [run.name for run in runs],
        "config": _config_differences(runs),
        "results": [
            {
                "group": figure.group,
                "name": figure.name,
                "unit": figure.unit,
                "values": _finite(figure.values),
                "stderrs": _finite(figure.stderrs),
                "differs_in": figure.differs_in,
            }
            for figure in figures
        ],
        "notes": _notes(runs, figures),
    }


def _open(directory: Path) -> Run:
    manifests = read_finished(directory)
    if not manifests:
        raise StageError(
            f"{directory} has no finished stage to compare",
            "a run directory with a manifest.json in at least one stage's directory",
            "none" if directory.is_dir() else why_unusable(directory, "directory"),
            "pass another run, or finish a stage of this one",
        )
    results = {}
    if _EVAL in manifests:
        path = directory / _EVAL / "results.json"
        results = read_json(path, "restore it, or redo the stage: python 04_eval.py --force")
    return Run(str(directory), manifests, config_of(manifests), results)


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """Return values with null for what JSON cannot hold."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _config_differences(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    values = {run.name: dict(leaves(run.config)) for run in runs}
    keys = dict.fromkeys(key for found in values.values() for key in found)
    first = values[runs[0].name]
    return {
        key: {name: found[key] for name, found in values.items() if key in found}
        for key in keys
        if any(key not in found or found[key] != first.get(key) for found in values.values())
    }


def _collect(runs: Sequence[Run]) -> list[Figure]:
    """Return the figures of all runs, in the order of the stages."""
    figures: dict[tuple[str, str], Figure] = {}
    for run in runs:
        for one in _figures_of(run):
            if isinstance(one.value, bool) or not isinstance(one.value, int | float):
                continue  # a stage that is not done has none
            new = Figure(one.group, one.name, one.unit)
            figure = figures.setdefault((one.group, one.name), new)
            figure.values[run.name] = float(one.value)
            figure.bases.append(one.basis)
            if isinstance(one.stderr, float):
                figure.stderrs[run.name] = one.stderr
    return list(figures.values())


def _figures_of(run: Run) -> list[_Measured]:
    """Return a run's figures; raise if its files hold other values than stages write."""
    try:
        return [*_trained(run), *_evaluated(run), *_sizes(run), *_resources(run)]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise StageError(
            f"{run.name} holds figures that cannot be read",
            "manifests and a results.json as stages write them",
            f"{type(error).__name__}: {error}",
            "restore the file that was changed, or redo its stage with --force",
        ) from error


def _trained(run: Run) -> Iterator[_Measured]:
    """Yield the losses of stage 03, and figures of the user's function."""
    metrics, group = run.metrics(_FINETUNE), "Training"
    basis = _text_basis(run, _FINETUNE, "train.jsonl")
    yield _Measured(group, "last training loss", "", metrics.get("train_loss"), basis)
    basis = _text_basis(run, _FINETUNE, "validation.jsonl")
    best = metrics.get("best_eval_perplexity")
    yield _Measured(group, "best validation perplexity", "", best, basis)
    own = metrics.get("metrics", {}).get(str(metrics.get("best_step")), {})
    basis = {**basis, "training.metrics": run.config.get("training", {}).get("metrics")}
    yield from (_Measured(group, f"{name} at best step", "", own[name], basis) for name in own)
    yield _Measured(group, "best step", "", metrics.get("best_step"), {})


def _evaluated(run: Run) -> Iterator[_Measured]:
    """Yield the figures of stage 04: perplexity, tasks, and whatever else its metrics hold."""
    metrics, settings = run.metrics(_EVAL), run.results.get("settings", {})
    basis = _text_basis(run, _EVAL, "validation.jsonl")
    basis["number of conversations"] = settings.get("conversations")
    for model, row in run.results.get("perplexity", {}).items():
        counted = row.get("supervised", {})
        of_model = {**basis, "number of supervised tokens": counted.get("tokens")}
        yield _Measured("Perplexity", model, "", counted.get("perplexity"), of_model)
    for task, models in metrics.get("tasks", {}).items():
        yield from _task(run, task, models)
    for key, value in metrics.items():
        if key not in ("tasks", "perplexity", "experts"):
            own = {"files of the base": _base_files(run)} if key == "divergence" else {}
            for name, each in leaves({key: value}):
                yield _Measured("Other figures of stage 04", name, "", each, {**basis, **own})


def _task(run: Run, task: str, models: Mapping[str, Mapping[str, Any]]) -> Iterator[_Measured]:
    """Yield each figure of a task by model, accuracy with its standard error."""
    measured = run.results.get("tasks", {}).get(task, {})
    found = {model: dict(leaves(dict(row))) for model, row in models.items()}
    for key in dict.fromkeys(key for row in found.values() for key in row):
        if key.rpartition(".")[2] in _NOT_RESULTS or key.endswith("_stderr"):
            continue
        for model, row in found.items():
            if model == "base" and any(part in key for part in _TO_BASE):
                continue  # the base's difference to itself
            requests = measured.get(model, {}).get("requests_sha256")
            basis = {"number of items": row.get("items"), "requests": requests}
            if any(part in key for part in _TO_BASE):
                basis["files of the base"] = _base_files(run)
            stderr = row.get(_stderr_of(key))
            unit = "fraction" if key.startswith("acc") else ""
            name = key.removeprefix("scores.").removesuffix(".value")
            yield _Measured(task, f"{name}, {model}", unit, row.get(key), basis, stderr)


def _base_files(run: Run) -> tuple[str, ...]:
    """Return the hashes of the base's files, as far as stage 02 recorded them."""
    rows = run.manifests.get(_COMPRESS, {}).get("inputs", [])
    return tuple(sorted(row["sha256"] for row in rows if Path(row["path"]).parts[0] != "data"))


def _stderr_of(key: str) -> str:
    """Return the key of a figure's standard error in a task's metrics."""
    if key == "acc":
        return "stderr"
    if key.endswith((".value", ".difference")):
        return f"{key.rpartition('.')[0]}.stderr"
    return f"{key}_stderr"


def _sizes(run: Run) -> Iterator[_Measured]:
    size = run.metrics(_COMPRESS).get("bytes_on_disk")
    yield _Measured("Size", "compressed model", "bytes", size, {})
    for name, manifest in run.manifests.items():
        if name.startswith(f"{_EXPORT}/"):
            yield _Measured("Size", name, "bytes", manifest["metrics"].get("bytes"), {})


def _resources(run: Run) -> Iterator[_Measured]:
    """Yield speed, and time and peak memory of each stage; they depend on the hardware."""
    speed, group = run.metrics(_FINETUNE).get("tokens_per_second"), "Time and memory"
    yield _Measured(group, "training, tokens per second", "", speed, _hardware(run, _FINETUNE))
    for name, manifest in run.manifests.items():
        basis, peaks = _hardware(run, name), dict(manifest.get("peak_bytes", {}))
        host, gpu = peaks.pop("host", None), max(peaks.values(), default=None)
        yield _Measured(group, f"{name}, time", "seconds", manifest["seconds"], basis)
        yield _Measured(group, f"{name}, peak host memory", "bytes", host, basis)
        yield _Measured(group, f"{name}, peak GPU memory", "bytes", gpu, basis)


def _text_basis(run: Run, stage: str, file: str) -> dict[str, Any]:
    """Return what a loss on conversations depends on: the file, how it was rendered and cut."""
    manifest = run.manifests.get(stage, {})
    files = {Path(row["path"]).name: row["sha256"] for row in manifest.get("inputs", [])}
    return {
        f"data, {file}": files.get(file),
        "date in the chat template": manifest.get("date"),
        "data.train_on": run.config.get("data", {}).get("train_on"),
        "sequence_len": run.config.get("sequence_len"),
        "model.base": run.config.get("model", {}).get("base"),
    }


def _hardware(run: Run, stage: str) -> dict[str, Any]:
    hardware = run.manifests.get(stage, {}).get("hardware", {})
    return {key: hardware.get(key) for key in ("machine", "cpu_count", "gpus")}


def _notes(runs: Sequence[Run], figures: Sequence[Figure]) -> list[str]:
    """Return what a reader of the tables must know."""
    notes = []
    marked: dict[tuple[str, ...], list[str]] = {}
    for figure in figures:
        if figure.differs_in:
            name = f"{figure.group}, {figure.name}"
            marked.setdefault(tuple(figure.differs_in), []).append(name)
    for parts, names in marked.items():
        told = ", ".join(parts)
        notes.append(f"† not measured on the same ({told}): {'; '.join(names)}")
    for run in runs:
        for name, earlier in find_outdated(run.manifests):
            notes.append(f"{run.name}: {name} was made from a result of {earlier} replaced since")
        notes += [f"{run.name}: {path} has changed since {_EVAL}" for path in _find_changed(run)]
    commits = {
        f"{str(m.get('git_commit'))[:12]}{' with changes' if m.get('git_dirty') else ''}"
        for run in runs
        for m in run.manifests.values()
    }
    if len(commits) > 1:
        notes.append(f"the stages ran with different code: commits {', '.join(sorted(commits))}")
    return notes


def _find_changed(run: Run) -> list[str]:
    """Return what stage 04 measured or wrote and is there with other contents now."""
    manifest = run.manifests.get(_EVAL, {})
    rows = [*manifest.get("inputs", []), *manifest.get("outputs", [])]
    there = [row for row in rows if (Path(run.name) / row["path"]).exists()]
    return [row["path"] for row in there if find_change(Path(run.name) / row["path"], row)]


def render(document: Mapping[str, Any]) -> str:
    """Return a document of `compare` as Markdown."""
    head = ["", *document["runs"]]
    changed = [
        [f"`{key}`", *(_config_value(values, run) for run in document["runs"])]
        for key, values in document["config"].items()
    ]
    lines = ["# Comparison", "", *(f"> {note}\n" for note in document["notes"])]
    lines += ["## Config: keys that differ", "", *(_table(head, changed) if changed else ["none"])]
    for group in dict.fromkeys(figure["group"] for figure in document["results"]):
        rows = [
            [
                f"{figure['name']}{' †' if figure['differs_in'] else ''}",
                *(_value(figure, run) for run in document["runs"]),
            ]
            for figure in document["results"]
            if figure["group"] == group
        ]
        lines += ["", f"## {group}", "", *_table(head, rows)]
    if any(figure["differs_in"] for figure in document["results"]):
        lines += ["", "† not measured on the same: see above"]
    return "\n".join(lines)


def _config_value(values: Mapping[str, Any], run: str) -> str:
    return json.dumps(values[run], ensure_ascii=False) if run in values else "no such key"


def _value(figure: Mapping[str, Any], run: str) -> str:
    if run not in figure["values"]:
        return _MISSING
    value, stderr = figure["values"][run], figure["stderrs"].get(run)
    if value is None:
        return "not finite"
    show = _FORMATS.get(figure["unit"], lambda number: f"{number:.6g}")
    return show(value) if stderr is None else f"{show(value)} ± {show(stderr)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return [line(head), "|" + "---|" * len(head), *map(line, rows)]


def main(argv: list[str] | None = None) -> int:
    """Print the comparison; return 0, 1 if a run cannot be read, 2 for a usage error."""
    begin_program()
    parser = argparse.ArgumentParser(prog="python -m sparselong.compare", description=__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="such as runs/NAME")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    arguments = parser.parse_args(argv)
    try:
        document = compare(arguments.runs)
        text = json.dumps(document, indent=1) if arguments.json else render(document)
        print(text, flush=True)
    except ExpectedError as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
