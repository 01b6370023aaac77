"""What the page shows, read from a run's directory and from nowhere else.

A file that cannot be read, or that has changed since its stage recorded it, is no reason to show
nothing: it becomes a problem that the page names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparselong.errors import StageError
from sparselong.files import parse_json, reason_of, refuse_special, why_unusable
from sparselong.provenance import find_change
from sparselong.report.elements import is_number
from sparselong.run import config_of, find_outdated, read_finished

HEALTH, COMPRESS, FINETUNE, EVAL = "01_health", "02_compress", "03_finetune", "04_eval"
EXPORT = "05_export"
_DEMO_TASK = "demo_hellaswag"
MODELS = {"base": "base", "compressed": "compressed", "finetuned": "fine-tuned"}
"""Names of stage 04's models for people; others are shown as they are."""


@dataclass(frozen=True)
class Run:
    """What is known of a run.

    Attributes:
        directory: the run's.
        manifests: those of finished stages, see `run.read_finished`.
        config: see `run.config_of`.
        results: stage 04's results.json; empty if it is not done.
        answers: by model, stage 04's tasks with the answer to each item.
        chats: by model and reasoning effort, what stage 04 says of fixed questions in a chat.
        items: by task, the items whose texts are in the run: `ctx`, `endings` and `label` of the
            demo's, `prompt` and `answers` of tasks whose answers are generated.
        rows: stage 03's metrics.jsonl; empty if it is not done.
        supervision: conversations as stage 03 trained on them.
        problems: what could not be read, or does not belong together.
    """

    directory: Path
    manifests: dict[str, dict[str, Any]]
    config: dict[str, Any]
    results: dict[str, Any] = field(default_factory=dict)
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    chats: dict[str, dict[str, Any]] = field(default_factory=dict)
    items: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    supervision: str = ""
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.directory.resolve().name

    def metrics(self, stage: str) -> dict[str, Any]:
        """Return a stage's metrics; empty if it is not done."""
        return self.manifests.get(stage, {}).get("metrics", {})


def open_run(directory: Path) -> Run:
    """Return what a run has finished.

    Raises:
        StageError: no stage is done, or a manifest is damaged or of another version.
    """
    manifests = read_finished(directory)
    if not manifests:
        raise StageError(
            f"no stage is done in {directory}",
            "a run directory with a manifest.json in at least one stage's directory",
            "none" if directory.is_dir() else why_unusable(directory, "directory"),
            "pass a run's directory, such as runs/NAME, or run python 01_health.py first",
        )
    problems = [
        f"{name} was made from a result of {earlier} that has been replaced since; run "
        f"python {name.partition('/')[0]}.py --force to make it from the present one."
        for name, earlier in find_outdated(manifests)
    ]
    reader = _Reader(directory, manifests, problems)
    results = reader.read_object(EVAL, "results.json")
    files, tasks, models = (_object(results.get(k)) for k in ("files", "tasks", "perplexity"))
    kept = {
        model: reader.read_object(EVAL, str(files.get(model, f"{model}.json"))) for model in models
    }
    return Run(
        directory,
        manifests,
        config_of(manifests),
        results=results,
        answers={model: _object(found.get("tasks")) for model, found in kept.items()},
        chats={model: _object(found.get("health")) for model, found in kept.items()},
        items={task: reader.read_items(task) for task in tasks},
        rows=reader.read_rows(FINETUNE, "metrics.jsonl", "step"),
        supervision=reader.read(FINETUNE, "supervision.txt"),
        problems=problems,
    )


def _object(value: Any) -> dict[str, Any]:
    """Return a value that is an object, or an empty one."""
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class _Reader:
    """Reads outputs of finished stages, and notes what is wrong with them."""

    directory: Path
    manifests: dict[str, dict[str, Any]]
    problems: list[str]

    def read(self, stage: str, name: str) -> str:
        """Return the text of an output; empty if the stage is not done or it cannot be read."""
        if stage not in self.manifests:
            return ""
        path = self.directory / stage / name
        recorded = {row["path"]: row for row in self.manifests[stage]["outputs"]}
        try:
            refuse_special(path)
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            self.problems.append(f"{stage}/{name} cannot be read: {reason_of(error)}.")
            return ""
        row = recorded.get(f"{stage}/{name}")
        change = find_change(path, row) if row else ""
        if change:
            self.problems.append(f"{stage}/{name} has changed since {stage} recorded it.")
        return text

    def read_object(self, stage: str, name: str) -> dict[str, Any]:
        """Return the JSON object of an output, as `read` does."""
        text = self.read(stage, name)
        if not text:
            return {}
        try:
            found = parse_json(text)
        except ValueError as error:
            self.problems.append(f"{stage}/{name} is not JSON: {reason_of(error)}.")
            return {}
        if not isinstance(found, dict):
            self.problems.append(f"{stage}/{name} is not a JSON object.")
            return {}
        return found

    def read_items(self, task: str) -> list[dict[str, Any]]:
        """Return a task's items; none if stage 04 wrote no file of them."""
        name = f"tasks/{'items' if task == _DEMO_TASK else Path(task).name}.jsonl"
        if not (self.directory / EVAL / name).is_file():
            return []
        return _objects(self.read(EVAL, name).splitlines(), "")

    def read_rows(self, stage: str, name: str, key: str) -> list[dict[str, Any]]:
        """Return the objects with a number as `key` on the lines of an output, as `read` does."""
        lines = self.read(stage, name).splitlines()
        rows = [row for row in _objects(lines, key) if is_number(row[key])]
        if len(rows) < len(lines):
            lost = f"{len(lines) - len(rows):,} of the {len(lines):,} lines"
            self.problems.append(
                f"{lost} of {stage}/{name} are not JSON objects with a number as {key}."
            )
        return rows


def _objects(lines: list[str], key: str) -> list[dict[str, Any]]:
    """Return the JSON objects on lines, with a key unless it is empty; other lines are left out."""
    rows = []
    for line in lines:
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and (not key or key in row):
            rows.append(row)
    return rows
