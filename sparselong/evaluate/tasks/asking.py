"""What lm-eval's tasks ask of a model, and its figures from the answers.

lm-eval runs no model. A stand-in for one collects its requests: texts whose likelihood is wanted
(multiple choice, and text that is scored as a whole) and prompts to be continued. Some process or
other answers them (`answering.py`); then lm-eval asks again, is given the answers, and grades them.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from sparselong.evaluate.tasks.grading import summarize
from sparselong.evaluate.tasks.suite import Suite
from sparselong.evaluate.work import Answers, Prompt, Questions, Request

_RESAMPLINGS = 1000
"""Bootstrap samples for the standard error of metrics that are no mean over items."""


class _StandIn(HFLM):
    """lm-eval's model for requests that are answered elsewhere.

    `requests` and `prompts` collect what lm-eval asks for, none of them twice, in the order in
    which it asks. Without answers every request gets the same one.
    """

    def __init__(self, suite: Suite, answers: Answers | None):
        config = SimpleNamespace(model_type="gpt_oss", max_position_embeddings=suite.positions)
        stand_in = SimpleNamespace(device=torch.device("cpu"), config=config)
        parent: Any = super()
        parent.__init__(
            pretrained=stand_in,
            tokenizer=suite.tokenizer,
            backend="causal",
            batch_size=suite.config.evaluation.batch_size,
            add_bos_token=False,
        )
        self.suite, self.answers = suite, answers
        self.requests: dict[tuple[tuple[int, ...], tuple[int, ...]], Request] = {}
        self.prompts: dict[tuple[str, int, tuple[str, ...]], Prompt] = {}

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        keys = [(tuple(context), tuple(scored)) for _, context, scored in requests]
        for context, scored in keys:
            tokens = [*context, *scored][-(self.suite.positions + 1) :]  # as lm-eval cuts them
            self.requests.setdefault((context, scored), Request(tokens, len(scored)))
        if self.answers is None:
            return [(0.0, False)] * len(requests)
        found = dict(zip(self.requests, self.answers.likelihoods, strict=False))
        return [found[key] for key in keys]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        parent: Any = super()
        return parent.loglikelihood(requests, True)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        keys = []
        for request in requests:
            text, given = request.args
            settings: Any = normalize_gen_kwargs(given, self.max_gen_toks)
            stops = tuple(stop for stop in settings["until"] if stop)
            key = (text, int(settings["max_gen_toks"]), stops)
            keys.append(key)
            if key not in self.prompts:
                self.prompts[key] = self._prompt(*key)
        if self.answers is None:
            return [""] * len(requests)
        found = dict(zip(self.prompts, self.answers.texts, strict=False))
        return [found[key] for key in keys]

    def _prompt(self, text: str, new_tokens: int, stops: tuple[str, ...]) -> Prompt:
        tokens = len(self.tok_encode(text))
        return Prompt(text, min(tokens, self.suite.positions - new_tokens), new_tokens, [*stops])


def list_questions(suite: Suite) -> Questions:
    """Return what the tasks ask of a model, none of it twice."""
    lm: Any = _stand_in(suite, None)
    by_kind: dict[str, list[Any]] = {}
    for task in suite.tasks.values():
        task.set_fewshot_seed(suite.config.seed)
        task.build_all_requests(limit=suite.config.evaluation.limit)
        for instance in task.instances:
            by_kind.setdefault(instance.request_type, []).append(instance)
    for kind, instances in by_kind.items():
        getattr(lm, kind)(instances)
    return Questions(list(lm.requests.values()), list(lm.prompts.values()), [])


def grade(suite: Suite, answers: Answers) -> dict[str, dict[str, Any]]:
    """Return the figures of a model that gave these answers to `list_questions`.

    Returns:
        By task as `grading.summarize`.
    """
    for task in suite.tasks.values():
        task.set_fewshot_seed(suite.config.seed)
    run_tasks: Any = lm_eval.evaluate  # lm-eval's decorators hide its signature
    results = run_tasks(
        lm=_stand_in(suite, answers),
        task_dict=suite.tree,
        limit=suite.config.evaluation.limit,
        bootstrap_iters=_RESAMPLINGS,
    )
    return {
        name: summarize(task, results["results"][name], results["samples"][name])
        for name, task in suite.tasks.items()
    }


def _stand_in(suite: Suite, answers: Answers | None) -> Any:
    open_model: Any = _StandIn  # lm-eval declares methods abstract that HFLM has
    return open_model(suite, answers)
