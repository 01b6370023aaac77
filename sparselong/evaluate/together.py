"""Measuring models in several processes, one for each GPU, with one process's figures.

lm-eval runs in the stage's process alone: what it asks goes to the ranks (work.json), they answer
(rank.py, `<model>.scores.json`), and lm-eval makes its figures from the answers. If a model fits on
a GPU, each rank holds all of it; otherwise the ranks share its experts and its vocabulary. A model
whose answers are complete is not measured again after an interruption.
"""

from __future__ import annotations

from typing import Any

from sparselong.errors import StageError
from sparselong.evaluate import models
from sparselong.evaluate.tasks import grade
from sparselong.evaluate.work import WORK, Answers, Mark, Work, rank_arguments, scores_path
from sparselong.files import load_json
from sparselong.processes import World, train_together
from sparselong.run import Stage


def measure(
    stage: Stage,
    world: World,
    marks: list[Mark],
    measurements: models.Measurements,
) -> dict[str, dict[str, Any]]:
    """Return every model's result, as `models.measure` does.

    Args:
        stage: the running stage.
        world: the processes.
        marks: the models; the first is the base.
        measurements: what they are measured on.

    Raises:
        StageError: a model does not fit, or a rank failed, which the message names.
    """
    results: dict[str, dict[str, Any]] = {}
    for mark in marks:
        if kept := models.find_kept(mark, stage.dir, stage.log):
            results[mark.name] = kept
    missing = [mark for mark in marks if mark.name not in results or mark.only_states]
    if missing:
        results |= _measure(stage, world, marks[0].directory, missing, measurements)
    return {mark.name: results[mark.name] for mark in marks}


def _measure(
    stage: Stage,
    world: World,
    base_dir: str,
    marks: list[Mark],
    measurements: models.Measurements,
) -> dict[str, dict[str, Any]]:
    work = Work(
        str(stage.run_dir.resolve()),
        base_dir,
        marks,
        measurements.questions,
        [(sample.input_ids, sample.supervised) for sample in measurements.samples],
    )
    todo = [each for each in work.models if _find_scores(stage, work, each.name) is None]
    if todo:
        _run_ranks(stage, world, work, todo)
    results = {}
    for mark in (mark for mark in marks if not mark.only_states):
        name = mark.name
        found = _find_scores(stage, work, name)
        if found is None:
            raise StageError(
                f"{scores_path(stage.dir, name)} is missing or damaged",
                "the answers that rank 0 wrote",
                "no such file, or other content",
                f"run {stage.same_command} again",
            )
        likelihoods = [(score, is_greedy) for score, is_greedy in found["likelihoods"]]
        result = {
            "fingerprint": mark.fingerprint,
            "perplexity": found["perplexity"],
            "divergence": found["divergence"],
            "health": found["health"],
            "tasks": grade(measurements.suite, Answers(likelihoods, found["texts"])),
            "speed": found["speed"],
            "seconds": found["seconds"],
            "peak_bytes": found["peak_bytes"],
            "experts": found["experts"],
        }
        results[name] = models.keep(name, result, stage.dir, stage.log)
        scores_path(stage.dir, name).unlink()
    (stage.dir / WORK).unlink(missing_ok=True)
    return results


def _run_ranks(stage: Stage, world: World, work: Work, todo: list[Mark]) -> None:
    stage.log(f"measuring in {world.size} processes")
    Work(**{**vars(work), "models": todo}).write(stage.dir / WORK)
    train_together(stage, rank_arguments(stage), world)


def _find_scores(stage: Stage, work: Work, name: str) -> dict[str, Any] | None:
    """Return a model's answers if they are complete and belong to this work."""
    try:
        found = load_json(scores_path(stage.dir, name))
    except (OSError, ValueError):
        return None
    return found if found.get("digest") == work.digest(name) else None
