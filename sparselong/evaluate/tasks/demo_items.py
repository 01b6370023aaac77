"""Open the demo task's items, for lm-eval.

`harness` copies this file into the task's folder, where lm-eval finds it beside the task's YAML. It
opens the items by their path, which lm-eval's own loader would read as a pattern or as a URL.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets

ITEMS = "items.jsonl"


def load(**_: Any) -> dict[str, datasets.Dataset]:
    """Return the items as the only split; lm-eval passes the task's metadata."""
    with Path(__file__).with_name(ITEMS).open(encoding="utf-8") as file:
        return {"validation": datasets.Dataset.from_list([json.loads(line) for line in file])}
