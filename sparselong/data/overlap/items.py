"""A task of lm-eval's items as texts; run as a program, those of tasks that are on this machine.

    python -m sparselong.data.overlap.items FILE LIMIT TASK TASK …

writes to FILE, as JSON, the items of each leaf task by its name, and why a task has none. It is a
process of its own because importing lm-eval takes seconds and much memory, and because libraries
read from the environment, when they are imported, that the network is not to be used.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from sparselong.registration import set_environment


def describe_item(task: Any, doc: Any) -> str:
    """Return an item's text with its right answer.

    Args:
        task: lm-eval's task.
        doc: one of its documents.
    """
    text, target = task.doc_to_text(doc), task.doc_to_target(doc)
    if task.OUTPUT_TYPE != "multiple_choice":
        return f"{text} {' '.join(map(str, target)) if isinstance(target, list) else target}"
    choices = task.doc_to_choice(doc)
    if isinstance(text, int):  # the choices are contexts, and the target follows (winogrande)
        return f"{choices[text]} {target}"
    return f"{text} {choices[target] if isinstance(target, int) else target}"


def _read(names: list[str], limit: int | None) -> dict[str, dict[str, Any]]:
    """Return the items of each leaf task, and by name why others cannot be read."""
    from lm_eval.evaluator_utils import get_task_list
    from lm_eval.tasks import TaskManager, get_task_dict

    manager = TaskManager()
    items: dict[str, list[str]] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            leaves = [leaf.task for leaf in get_task_list(get_task_dict([name], manager))]
            for task in leaves:
                docs = task.doc_iterator(limit=limit)
                items[task.task_name] = [describe_item(task, doc) for _, doc in docs]
        except Exception as error:  # whatever its code or its data set raises
            missing[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return {"items": items, "missing": missing}


def main(arguments: list[str]) -> None:
    """Write the items of the named tasks to a file."""
    set_environment()
    path, limit, *names = arguments
    found = _read(names, int(limit) or None)
    Path(path).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
