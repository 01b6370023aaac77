"""Whether lm-eval has the evaluation tasks that a config names, without importing it.

Stage 04 comes last, so an unknown name would be noticed hours after it could have been. Importing
lm-eval takes many seconds. Its tasks are defined in YAML files, in which the name of every task,
group and tag is spelled out, usually in a folder of that name.
"""

from __future__ import annotations

import difflib
import re
from importlib.util import find_spec
from pathlib import Path

from sparselong.config import Config
from sparselong.errors import ConfigError

DEMO_TASK = "demo_hellaswag"
"""The task that is made from the demo's held-out text."""


def check_tasks(config: Config) -> None:
    """Raise if a name in `evaluation.tasks` is in none of lm-eval's files.

    Raises:
        ConfigError: names the task and similar ones.
    """
    spec = find_spec("lm_eval")
    if spec is None or spec.origin is None:  # 01_health reports missing packages
        return
    folder = Path(spec.origin).parent / "tasks"
    for name in config.evaluation.tasks:
        if name != DEMO_TASK and not _is_defined(name, folder):
            known = [path.name for path in folder.iterdir() if path.is_dir() and path.name != name]
            inside = sorted(path.stem for path in (folder / name).glob("*.yaml"))[:3]
            close = inside or difflib.get_close_matches(name, known, n=3)
            raise ConfigError(
                f"evaluation.tasks names {name}, which lm-eval does not have",
                "lm-eval task names",
                name,
                f"did you mean {', '.join(close)}?" if close else "see `lm-eval ls tasks`",
            )


def _is_defined(name: str, folder: Path) -> bool:
    """Return whether a name is the value of `task`, `group` or `tag`, or an entry of a list."""
    key = rb"""['"]?(?:task|group|tag)['"]?:[ \t]*"""
    word = rb"""['"]?""" + re.escape(name.encode()) + rb"""['"]?[ \t]*(?:[,#].*)?\r?$"""
    line = re.compile(rb"^[ \t]*(?:-[ \t]+(?:" + key + rb")?|" + key + rb")" + word, re.MULTILINE)
    for place in (folder / name, folder):  # usually in the folder of that name
        paths = (path for path in place.rglob("*") if path.suffix in ("", ".yaml", ".yml"))
        if any(line.search(path.read_bytes()) for path in paths if path.is_file()):
            return True
    return False
