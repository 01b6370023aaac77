"""Multiple-choice accuracy through lm-eval, the same questions put the same way to every model.

lm-eval takes longer to import than a small model to measure, so the tasks are loaded once into a
`Suite` and every model is passed through it as an object. Settings that decide the figures:

- No chat template and no beginning-of-text token. gpt-oss was trained on harmony, and its accuracy
  on plain text continuations is lower than a chat's would suggest; but likelihoods of endings are
  defined on plain text, the published figures are made this way, and harmony itself uses no
  beginning-of-text token. Only differences between models measured alike mean something here.
- Log-softmax in float32. lm-eval's default takes it in the model's type; in bfloat16 that rounds
  each token's log-probability to two or three digits before an ending's are added up.
- The base model's tokenizer for all models, and a seed that is set anew for each, so that the
  requests are equal; their hash is kept with the result and compared.

`demo_hellaswag` is lm-eval's own hellaswag task over a local file, as a task YAML in the stage's
directory: `lm-eval run --include_path` would take it too. All other names are lm-eval's and load
their items from the hub. Left out: tasks whose answers are generated rather than chosen.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import yaml
from lm_eval.evaluator_utils import get_task_list
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager, get_task_dict

from sparselong.config import Config
from sparselong.data import explain_hub_failures, write_hellaswag
from sparselong.errors import ConfigError, StageError

DEMO_TASK = "demo_hellaswag"


class _Model(HFLM):
    """lm-eval's model, with a progress bar only where somebody watches."""

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        parent: Any = super()
        return parent.loglikelihood(requests, disable_tqdm or not sys.stderr.isatty())


@dataclass(frozen=True)
class Suite:
    """Loaded tasks, ready for one model after another."""

    config: Config
    tokenizer: Any
    tree: dict[Any, Any]
    """As lm-eval nests tasks in groups."""
    tasks: dict[str, Any]
    """The leaves by name."""


def load_suite(config: Config, folder: Path, tokenizer: Any) -> Suite:
    """Loads `config.evaluation.tasks`; the demo's items are written to `folder`.

    Raises:
        ConfigError: lm-eval has no task of that name.
        StageError: a task's data cannot be had, it is not multiple choice, or has too few items.
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


def measure(model: Any, suite: Suite) -> dict[str, dict[str, Any]]:
    """Puts every item of every task to a model.

    Args:
        model: a transformers causal language model, on its device, in eval mode.

    Returns:
        By task: `acc` and `acc_norm` (most likely ending; the same per byte) with `acc_stderr` and
        `acc_norm_stderr`, `items`, `chance`, `right` and `right_norm` (1 or 0 by item),
        `requests_sha256`. A task without a length-normalized accuracy has none of its keys.
    """
    evaluation = suite.config.evaluation
    for task in suite.tasks.values():
        task.set_fewshot_seed(suite.config.seed)
    run_tasks: Any = lm_eval.evaluate  # lm-eval's decorators hide what it and its classes take
    open_model: Any = _Model
    results = run_tasks(
        lm=open_model(
            pretrained=model,
            tokenizer=suite.tokenizer,
            backend="causal",
            batch_size=evaluation.batch_size,
            add_bos_token=False,
            softmax_dtype="float32",
        ),
        task_dict=suite.tree,
        limit=evaluation.limit,
    )
    return {
        name: _summarize(results["results"][name], results["samples"][name]) for name in suite.tasks
    }


def list_items(suite: Suite) -> dict[str, list[str]]:
    """By task, the text of each item that is measured, with its right answer."""
    limit = suite.config.evaluation.limit
    return {
        name: [_item_text(task, doc) for _, doc in task.doc_iterator(limit=limit)]
        for name, task in suite.tasks.items()
    }


def _item_text(task: Any, doc: dict[str, Any]) -> str:
    text, choices, target = task.doc_to_text(doc), task.doc_to_choice(doc), task.doc_to_target(doc)
    if isinstance(text, int):  # the choices are contexts, the target is what follows (winogrande)
        return f"{choices[text]} {target}"
    return f"{text} {choices[target] if isinstance(target, int) else target}"


def _write_demo_task(folder: Path, tokenizer: Any, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    items = folder / "items.jsonl"
    write_hellaswag(items, tokenizer, seed)
    task = {
        "include": str(Path(lm_eval.__file__).parent / "tasks/hellaswag/hellaswag.yaml"),
        "task": DEMO_TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(items.resolve())}},
        "training_split": None,
    }
    (folder / f"{DEMO_TASK}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


def _check_task(name: str, task: Any, limit: int | None) -> None:
    if task.OUTPUT_TYPE != "multiple_choice":
        raise StageError(
            f"task {name} cannot be measured",
            "a multiple-choice task",
            f"output type {task.OUTPUT_TYPE}",
            "take it out of evaluation.tasks, or run it with lm-eval itself",
        )
    items = min(len(task.eval_docs), limit or len(task.eval_docs))
    if items < 2:
        raise StageError(
            f"task {name} is too small",
            "at least 2 items: one has no standard error",
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
    }
    for metric, kept in (("acc", "right"), ("acc_norm", "right_norm")):
        if f"{metric},none" in result:
            summary[metric] = result[f"{metric},none"]
            summary[f"{metric}_stderr"] = result[f"{metric}_stderr,none"]
            summary[kept] = [int(sample[metric]) for sample in samples]
    return summary
