"""Open and score RULER's items, for lm-eval.

`suite` copies this file into the tasks' folder, where lm-eval finds it beside their YAML. It opens
the items by their path, as demo_items.py does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets

from sparselong.data import score_answer


def load(*, items: str, **_: Any) -> dict[str, datasets.Dataset]:
    """Return a file's items as the only split; `items` is in the task's metadata."""
    with Path(__file__).with_name(items).open(encoding="utf-8") as file:
        return {"test": datasets.Dataset.from_list([json.loads(line) for line in file])}


def score(item: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """Return the fraction of the wanted texts that the answer contains."""
    return {"score": score_answer(answers[0], item["answers"])}
