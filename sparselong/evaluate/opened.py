"""What is measured on an opened model, in one process or in each of several."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from sparselong.config import Config
from sparselong.evaluate import divergence, health, perplexity
from sparselong.evaluate.answering import answer, measure_speed
from sparselong.evaluate.spread import Spread
from sparselong.evaluate.work import BASE, Answers, Mark, Questions


class Measured(NamedTuple):
    """Figures of a model.

    Attributes:
        perplexity: as from `perplexity.measure`.
        divergence: as from `divergence.measure`; None if there is nothing to compare, and
            {left_out: why} if it cannot be compared.
        answers: to what tasks ask.
        health: of its chats, as from `health.describe`.
        prompts: how fast those that it continued were, as from `measure_speed`.
    """

    perplexity: dict[str, Any]
    divergence: dict[str, Any] | None
    answers: Answers
    health: dict[str, dict[str, Any]]
    prompts: list[dict[str, Any]]


def measure_opened(
    mark: Mark,
    model: Any,
    questions: Questions,
    samples: list[perplexity.Sample],
    tokenizer: Any,
    config: Config,
    spread: Spread,
    folder: Path,
) -> Measured | None:
    """Return a model's figures; None if only the base's hidden states are needed.

    Args:
        mark: which model it is.
        model: a GptOssForCausalLM in eval mode, or this process's part of it.
        questions: what is asked.
        samples: the conversations.
        tokenizer: the base's.
        config: the run's config.
        spread: the processes that measure it together; all get all figures but their own speed.
        folder: the stage's directory.
    """
    batch_size = config.evaluation.batch_size
    divergent: dict[str, Any] | None = None
    compared = samples[: config.evaluation.divergence_samples]
    if compared and mark.name == BASE:
        divergence.save_states(model, compared, batch_size, spread, folder / divergence.STATES)
    if mark.only_states:
        return None
    found = perplexity.measure(model, samples, batch_size, spread)
    if compared and mark.name != BASE and mark.has_base_head:
        states = folder / divergence.STATES
        divergent = divergence.measure(model, compared, batch_size, spread, states)
    elif compared and mark.name != BASE:
        divergent = {"left_out": "its lm_head is not the base's"}
    answers, continued = answer(model, questions, tokenizer, batch_size, spread)
    chats = health.describe(continued[len(questions.prompts) :], tokenizer)
    return Measured(found, divergent, answers, chats, measure_speed(continued))
