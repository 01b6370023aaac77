"""Measurement of an opened model on tasks, as stage 04 does in one process."""

from typing import Any

from sparselong.evaluate.answering import answer
from sparselong.evaluate.spread import Spread
from sparselong.evaluate.tasks import Suite, grade, list_questions


def measure_tasks(model: Any, suite: Suite) -> dict[str, dict[str, Any]]:
    """Return a model's figures by task."""
    batch_size = suite.config.evaluation.batch_size
    answers, _ = answer(model, list_questions(suite), suite.tokenizer, batch_size, Spread())
    return grade(suite, answers)
