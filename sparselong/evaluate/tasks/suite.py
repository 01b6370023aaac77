"""lm-eval's tasks, loaded once and asked of every model in the same way.

Importing lm-eval takes longer than measuring a small model, so the tasks are loaded once into a
`Suite`, which writes down what they ask and grades what a model answers (asking.py). lm-eval never
runs a model. These settings determine the figures:

- No chat template and no beginning-of-text token. gpt-oss was trained on harmony, and its accuracy
  on plain-text continuations is lower than in a chat. But likelihoods of endings are defined on
  plain text, published figures are measured this way, and harmony itself has no beginning-of-text
  token. Only differences between models measured in the same way are meaningful.
- The base model's tokenizer for all models, and the seed reset before each, so that all requests
  are identical. Their hash is stored with the result and compared.

`demo_hellaswag` is lm-eval's own hellaswag task over a local file, and RULER's tasks are written by
this project, one for each length. Both are task YAMLs in the stage's directory; `lm-eval run
--include_path` also accepts it. All other names are lm-eval tasks that load their items from the
hub.
"""

from __future__ import annotations

import difflib
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import lm_eval
import yaml
from lm_eval.evaluator_utils import get_task_list
from lm_eval.tasks import TaskManager, get_task_dict

from sparselong.config import Config
from sparselong.data import (
    DEMO_TASK,
    answer_tokens,
    check_definition,
    describe_item,
    explain_hub_failures,
    make_items,
    write_hellaswag,
)
from sparselong.errors import ConfigError, StageError
from sparselong.evaluate.tasks import demo_items, ruler_items


@dataclass(frozen=True)
class Suite:
    """Loaded tasks, reusable for several models."""

    config: Config
    tokenizer: Any
    tree: dict[Any, Any]
    """lm-eval's nesting of tasks in groups."""
    tasks: dict[str, Any]
    """The leaf tasks by name."""
    positions: int
    """The base's max_position_embeddings; longer texts are cut on the left."""


def load_suite(config: Config, folder: Path, tokenizer: Any, positions: int) -> Suite:
    """Load `config.evaluation.tasks`, writing to `folder` those that are made here.

    Args:
        config: the run's config.
        folder: for task YAMLs and their items.
        tokenizer: the base's.
        positions: the base's max_position_embeddings.

    Raises:
        ConfigError: lm-eval has no task of that name, it is not supported, or one of RULER's
            lengths exceeds the model's.
        StageError: a task's data is unavailable, or it has too few items.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names = _write_own_tasks(config, folder, tokenizer, positions)
    own = {DEMO_TASK, *_ruler_names(config)}
    manager = TaskManager(
        include_path=str(folder) if own & set(names) else None,
        include_defaults=not own.issuperset(names),
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
        shots = 0 if name in own - {DEMO_TASK} else config.evaluation.num_fewshot
        task.set_config("num_fewshot", shots)
    return Suite(config, tokenizer, tree, tasks, positions)


def list_items(suite: Suite) -> dict[str, list[str]]:
    """Return by task the text of each measured item with its right answer.

    RULER's items are left out: they are drawn at random.
    """
    limit, drawn = suite.config.evaluation.limit, _ruler_names(suite.config)
    return {
        name: [describe_item(task, doc) for _, doc in task.doc_iterator(limit=limit)]
        for name, task in suite.tasks.items()
        if name not in drawn
    }


def _ruler_names(config: Config) -> dict[str, tuple[str, int]]:
    """Return RULER's task and length by the name of the leaf task."""
    return {
        f"{task}_{length}": (task, length)
        for task in config.evaluation.ruler_tasks
        for length in config.evaluation.ruler.lengths
    }


def _write_own_tasks(config: Config, folder: Path, tokenizer: Any, positions: int) -> list[Any]:
    """Write the tasks that are made here, and return the names of all leaf tasks and groups."""
    drawn, names = _ruler_names(config), []
    for task in config.evaluation.tasks:
        own = [name for name, (base, _) in drawn.items() if base == task]
        names += own or [task]
    if DEMO_TASK in names:
        folder.mkdir(parents=True, exist_ok=True)
        write_hellaswag(folder / demo_items.ITEMS, tokenizer, config.seed)
        definition = {
            "include": str(Path(lm_eval.__file__).parent / "tasks/hellaswag/hellaswag.yaml"),
            "task": DEMO_TASK,
            "dataset_path": DEMO_TASK,
            "training_split": None,
        }
        _write_task(folder, definition, demo_items)
    for name, (task, length) in drawn.items():
        if length > positions:
            raise ConfigError(
                f"evaluation.ruler.lengths has {length:,}, which the model does not support",
                f"at most {positions:,} tokens, its max_position_embeddings",
                f"{length:,}",
                "remove it from evaluation.ruler.lengths",
            )
        _write_ruler_task(folder, name, task, length, config, tokenizer)
    return names


def _write_ruler_task(
    folder: Path, name: str, task: str, length: int, config: Config, tokenizer: Any
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    count = min(config.evaluation.ruler.items, config.evaluation.limit or 2**31)
    items = make_items(task, length, count, config.seed, tokenizer)
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    definition = {
        "task": name,
        "dataset_path": name,
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answers|join(', ')}}",
        "generation_kwargs": {
            "do_sample": False,
            "max_gen_toks": answer_tokens(task),
            "until": [],
        },
        "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0, "items": file.name},
    }
    _write_task(folder, definition, ruler_items, "process_results: !function {}.score\n")


def _write_task(
    folder: Path, definition: dict[str, Any], loader: ModuleType, more: str = ""
) -> None:
    """Write a task's YAML, whose items a copy of a module's file opens with `load`."""
    file = Path(str(loader.__file__))
    shutil.copyfile(file, folder / file.name)
    text = f"{yaml.safe_dump(definition)}custom_dataset: !function {file.stem}.load\n"
    path = folder / f"{definition['task']}.yaml"
    path.write_text(text + more.format(file.stem), encoding="utf-8")


def _check_task(name: str, task: Any, limit: int | None) -> None:
    check_definition(name, task.dump_config())
    items = min(len(task.eval_docs), limit or len(task.eval_docs))
    if items < 2:
        raise StageError(
            f"task {name} is too small",
            "at least 2 items: a single item has no standard error",
            f"{items}",
            "raise evaluation.limit",
        )
