"""Multiple-choice accuracy through lm-eval, with identical questions for every model.

Importing lm-eval takes longer than measuring a small model, so the tasks are loaded once into a
`Suite`, and each model is passed to it as an object. These settings determine the figures:

- No chat template and no beginning-of-text token. gpt-oss was trained on harmony, and its accuracy
  on plain-text continuations is lower than in a chat. But likelihoods of endings are defined on
  plain text, published figures are measured this way, and harmony itself has no beginning-of-text
  token. Only differences between models measured in the same way are meaningful.
- Log-softmax in float32. lm-eval's default is the model's dtype; bfloat16 rounds each token's
  log-probability to two or three digits before those of an ending are added up.
- The base model's tokenizer for all models, and the seed reset before each, so that all requests
  are identical. Their hash is stored with the result and compared.

`demo_hellaswag` is lm-eval's own hellaswag task over a local file, written as a task YAML in the
stage's directory; `lm-eval run --include_path` also accepts it. All other names are lm-eval tasks
that load their items from the hub. If several processes measure a model, they get lm-eval's
requests as tokens (`list_requests`), and lm-eval gets their answers (`grade`). Left out: tasks
whose answers are generated rather than chosen.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import torch
import yaml
from lm_eval.evaluator_utils import get_task_list
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager, get_task_dict

from sparselong.config import Config
from sparselong.data import (
    DEMO_TASK,
    check_output_type,
    explain_hub_failures,
    write_hellaswag,
)
from sparselong.errors import ConfigError, StageError
from sparselong.evaluate import demo_items
from sparselong.evaluate.work import Request


class _Model(HFLM):
    """lm-eval's Hugging Face model, with our progress in place of its bar.

    `report` is told after each pass how many answers there are, and how many there will be.
    """

    report: Callable[[int, int], None] | None = None
    done = total = 0

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        parent: Any = super()
        self.done, self.total = 0, len(requests)
        self._count(0)
        found = parent.loglikelihood(requests, disable_tqdm=True)
        if self.done < self.total:  # one pass may answer several requests
            self._count(self.total - self.done)
        return found

    def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
        parent: Any = super()
        logits = parent._model_call(inps, *args, **kwargs)
        self._count(len(inps))
        return logits

    def _count(self, rows: int) -> None:
        if self.report is not None:
            self.done += rows
            self.report(self.done, self.total)


class _Elsewhere(_Model):
    """lm-eval's model for likelihoods that other processes compute.

    `requests` collects what lm-eval asks for, by context and continuation. Without answers every
    request gets the same one.
    """

    def __init__(self, suite: Suite, positions: int, answers: list[tuple[float, bool]] | None):
        config = SimpleNamespace(model_type="gpt_oss", max_position_embeddings=positions)
        stand_in = SimpleNamespace(device=torch.device("cpu"), config=config)
        parent: Any = super()
        parent.__init__(**_settings(stand_in, suite))
        self.positions, self.answers = positions, answers
        self.requests: dict[tuple[tuple[int, ...], tuple[int, ...]], Request] = {}

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        keys = [(tuple(context), tuple(scored)) for _, context, scored in requests]
        for context, scored in keys:
            tokens = [*context, *scored][-(self.positions + 1) :]  # as lm-eval cuts them
            self.requests.setdefault((context, scored), Request(tokens, len(scored)))
        if self.answers is None:
            return [(0.0, False)] * len(requests)
        found = dict(zip(self.requests, self.answers, strict=False))  # the same order every time
        return [found[key] for key in keys]


@dataclass(frozen=True)
class Suite:
    """Loaded tasks, reusable for several models."""

    config: Config
    tokenizer: Any
    tree: dict[Any, Any]
    """lm-eval's nesting of tasks in groups."""
    tasks: dict[str, Any]
    """The leaf tasks by name."""


def load_suite(config: Config, folder: Path, tokenizer: Any) -> Suite:
    """Load `config.evaluation.tasks`, writing the demo's items to `folder` if it is one of them.

    Raises:
        ConfigError: lm-eval has no task of that name, or it is not multiple choice.
        StageError: a task's data is unavailable, or it has too few items.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names: list[Any] = list(config.evaluation.tasks)
    if DEMO_TASK in names:
        _write_demo_task(folder, tokenizer, config.seed)
    manager = TaskManager(
        include_path=str(folder) if DEMO_TASK in names else None,
        include_defaults=names != [DEMO_TASK],
    )
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise ConfigError(
                f"evaluation.tasks names {name}, which lm-eval {lm_eval.__version__} does not have",
                "lm-eval task names",
                name,
                f"did you mean {', '.join(close)}?" if close else "see `lm-eval ls tasks`",
            )
    with explain_hub_failures(
        f"the items of {', '.join(names)} could not be loaded",
        "their datasets on the hub or in its local cache",
        "check the network (HF_HUB_OFFLINE must be unset for the first download), or measure "
        f"without it: 'evaluation.tasks=[{DEMO_TASK}]'",
    ):
        tree = get_task_dict(names, manager)
    tasks: dict[str, Any] = {str(leaf.task_name): leaf.task for leaf in get_task_list(tree)}
    for name, task in tasks.items():
        _check_task(name, task, config.evaluation.limit)
        task.set_config("num_fewshot", config.evaluation.num_fewshot)
    return Suite(config, tokenizer, tree, tasks)


def measure(
    model: Any, suite: Suite, report: Callable[[int, int], None] | None = None
) -> dict[str, dict[str, Any]]:
    """Measure a model on every item of every task.

    Args:
        model: a transformers causal language model, on its device, in eval mode.
        suite: the loaded tasks.
        report: is told how many likelihoods are known, and of how many.

    Returns:
        By task: `acc` (most likely ending) and `acc_norm` (the same per character) with
        `acc_stderr` and `acc_norm_stderr`, `items`, `chance`, `right` and `right_norm` (1 or 0 by
        item), `log_likelihoods` (those of an item's endings, in nats), `requests_sha256`. Tasks
        without length-normalized accuracy lack its keys.
    """
    open_model: Any = _Model
    lm = open_model(**_settings(model, suite))
    lm.report = report
    return _run(lm, suite)


def list_requests(suite: Suite, positions: int) -> list[Request]:
    """Return the texts whose likelihoods lm-eval wants of a model, none of them twice.

    Args:
        suite: the loaded tasks.
        positions: the model's max_position_embeddings; longer texts are cut on the left.
    """
    lm: Any = _elsewhere(suite, positions, None)
    _run(lm, suite)
    return list(lm.requests.values())


def grade(
    suite: Suite, positions: int, answers: list[tuple[float, bool]]
) -> dict[str, dict[str, Any]]:
    """Return what `measure` returns, from the answers to `list_requests`.

    Args:
        suite: the loaded tasks.
        positions: as for `list_requests`.
        answers: log-likelihood of each request, and whether its tokens are the most likely ones.
    """
    return _run(_elsewhere(suite, positions, answers), suite)


def _elsewhere(suite: Suite, positions: int, answers: list[tuple[float, bool]] | None) -> Any:
    open_model: Any = _Elsewhere  # lm-eval declares methods abstract that HFLM has
    return open_model(suite, positions, answers)


def _settings(model: Any, suite: Suite) -> dict[str, Any]:
    return {
        "pretrained": model,
        "tokenizer": suite.tokenizer,
        "backend": "causal",
        "batch_size": suite.config.evaluation.batch_size,
        "add_bos_token": False,
        "softmax_dtype": "float32",
    }


def _run(lm: Any, suite: Suite) -> dict[str, dict[str, Any]]:
    for task in suite.tasks.values():
        task.set_fewshot_seed(suite.config.seed)
    run_tasks: Any = lm_eval.evaluate  # lm-eval's decorators hide these signatures
    limit = suite.config.evaluation.limit
    results = run_tasks(lm=lm, task_dict=suite.tree, limit=limit)
    return {
        name: _summarize(results["results"][name], results["samples"][name]) for name in suite.tasks
    }


def list_items(suite: Suite) -> dict[str, list[str]]:
    """Return by task the text of each measured item with its right answer."""
    limit = suite.config.evaluation.limit
    return {
        name: [_item_text(task, doc) for _, doc in task.doc_iterator(limit=limit)]
        for name, task in suite.tasks.items()
    }


def _item_text(task: Any, doc: dict[str, Any]) -> str:
    text, choices, target = task.doc_to_text(doc), task.doc_to_choice(doc), task.doc_to_target(doc)
    if isinstance(text, int):  # the choices are contexts, and the target follows (winogrande)
        return f"{choices[text]} {target}"
    return f"{text} {choices[target] if isinstance(target, int) else target}"


def _write_demo_task(folder: Path, tokenizer: Any, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_hellaswag(folder / demo_items.ITEMS, tokenizer, seed)
    loader = Path(demo_items.__file__)
    shutil.copyfile(loader, folder / loader.name)
    task = {
        "include": str(Path(lm_eval.__file__).parent / "tasks/hellaswag/hellaswag.yaml"),
        "task": DEMO_TASK,
        "dataset_path": DEMO_TASK,
        "training_split": None,
    }
    text = f"{yaml.safe_dump(task)}custom_dataset: !function {loader.stem}.load\n"
    (folder / f"{DEMO_TASK}.yaml").write_text(text, encoding="utf-8")


def _check_task(name: str, task: Any, limit: int | None) -> None:
    check_output_type(name, str(task.OUTPUT_TYPE))
    items = min(len(task.eval_docs), limit or len(task.eval_docs))
    if items < 2:
        raise StageError(
            f"task {name} is too small",
            "at least 2 items: a single item has no standard error",
            f"{items}",
            "raise evaluation.limit",
        )


def _summarize(result: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    requests = json.dumps([sample["arguments"] for sample in samples], ensure_ascii=False)
    summary: dict[str, Any] = {
        "items": len(samples),
        "chance": sum(1 / len(sample["arguments"]) for sample in samples) / len(samples),
        "requests_sha256": hashlib.sha256(requests.encode()).hexdigest(),
        "log_likelihoods": [
            [float(likelihood) for likelihood, _ in sample["filtered_resps"]] for sample in samples
        ],
    }
    for metric, kept in (("acc", "right"), ("acc_norm", "right_norm")):
        if f"{metric},none" in result:
            summary[metric] = result[f"{metric},none"]
            summary[f"{metric}_stderr"] = result[f"{metric}_stderr,none"]
            summary[kept] = [int(sample[metric]) for sample in samples]
    return summary
