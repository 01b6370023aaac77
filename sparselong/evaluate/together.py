"""Measuring models in several processes, one for each GPU, with one process's figures.

lm-eval runs in the stage's process alone: it says which texts' likelihoods it wants (work.json),
the ranks compute them (rank.py, `<model>.scores.json`), and lm-eval makes its figures from them.
If a model fits on a GPU, each rank holds all of it; otherwise the ranks share its experts and its
vocabulary. A model whose likelihoods are complete is not measured again after an interruption.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparselong.errors import StageError
from sparselong.evaluate import harness, models
from sparselong.evaluate.work import WORK, Work, rank_arguments, scores_path
from sparselong.files import load_json, read_json
from sparselong.processes import World, train_together
from sparselong.run import Stage


def measure(
    stage: Stage,
    world: World,
    marks: list[tuple[str, Path, str]],
    measurements: models.Measurements,
) -> dict[str, dict[str, Any]]:
    """Return every model's result, as `models.measure` does.

    Args:
        stage: the running stage.
        world: the processes.
        marks: name, directory and fingerprint of each model.
        measurements: what they are measured on.

    Raises:
        StageError: a model does not fit, or a rank failed, which the message names.
    """
    results: dict[str, dict[str, Any]] = {}
    for name, _, mark in marks:
        if kept := models.find_kept(name, mark, stage.dir, stage.log):
            results[name] = kept
    missing = [each for each in marks if each[0] not in results]
    if missing:
        results |= _measure(stage, world, missing, measurements)
    return {name: results[name] for name, _, _ in marks}


def _measure(
    stage: Stage,
    world: World,
    marks: list[tuple[str, Path, str]],
    measurements: models.Measurements,
) -> dict[str, dict[str, Any]]:
    positions = read_json(marks[0][1] / "config.json")["max_position_embeddings"]
    work = Work(
        str(stage.run_dir.resolve()),
        [(name, str(path.resolve()), mark) for name, path, mark in marks],
        harness.list_requests(measurements.suite, positions),
        [(sample.input_ids, sample.supervised) for sample in measurements.samples],
    )
    todo = [each for each in work.models if _find_scores(stage, work, each[0]) is None]
    if todo:
        _run_ranks(stage, world, work, todo)
    results = {}
    for name, _, mark in marks:
        found = _find_scores(stage, work, name)
        if found is None:
            raise StageError(
                f"{scores_path(stage.dir, name)} is missing or damaged",
                "the likelihoods that rank 0 wrote",
                "no such file, or other content",
                f"run {stage.same_command} again",
            )
        answers = [(score, is_greedy) for score, is_greedy in found["answers"]]
        result = {
            "fingerprint": mark,
            "perplexity": found["perplexity"],
            "tasks": harness.grade(measurements.suite, positions, answers),
            "seconds": found["seconds"],
            "peak_bytes": found["peak_bytes"],
            "experts": found["experts"],
        }
        results[name] = models.keep(name, result, stage.dir, stage.log)
        scores_path(stage.dir, name).unlink()
    (stage.dir / WORK).unlink(missing_ok=True)
    return results


def _run_ranks(stage: Stage, world: World, work: Work, todo: list[tuple[str, str, str]]) -> None:
    stage.log(f"measuring in {world.size} processes")
    Work(**{**vars(work), "models": todo}).write(stage.dir / WORK)
    train_together(stage, rank_arguments(stage), world)


def _find_scores(stage: Stage, work: Work, name: str) -> dict[str, Any] | None:
    """Return a model's likelihoods if they are complete and belong to this work."""
    try:
        found = load_json(scores_path(stage.dir, name))
    except (OSError, ValueError):
        return None
    return found if found.get("digest") == work.digest(name) else None
