"""Whether stage 04 can measure the evaluation tasks that a config names, without importing lm-eval.

Stage 04 comes last, so an unknown name, or a task that it cannot measure, would be noticed hours
after it could have been. Importing lm-eval takes many seconds. Its tasks are defined in YAML files,
in which the name of every task, group and tag is spelled out, usually in a folder of that name, and
with it, directly or in an included file, how a task is measured.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import yaml

from sparselong.config import RULER_TASKS, Config
from sparselong.data.ruler import LEFT_OUT, load_words
from sparselong.errors import ConfigError

DEMO_TASK = "demo_hellaswag"
"""The task that is made from the demo's held-out text."""
_GREEDY = frozenset(
    ("until", "do_sample", "temperature", "top_p", "top_k", "max_gen_toks", "max_new_tokens")
)
"""Keys of `generation_kwargs` that have a meaning here, or none for the most likely token."""
_SET_BY_GROUPS = ("generation_kwargs", "unsafe_code")
"""Keys of a task that a group may set for its members."""
_DEEPEST = 9
"""Groups within groups that are followed."""


def check_tasks(config: Config) -> None:
    """Raise if a name in `evaluation.tasks` is unknown, or stands for a task that is not supported.

    Raises:
        ConfigError: names the task, and similar ones if lm-eval does not have it.
        StageError: RULER's words are missing.
    """
    if config.evaluation.ruler_tasks:
        load_words()
    spec = find_spec("lm_eval")
    if spec is None or spec.origin is None:  # 01_health reports missing packages
        return
    folder = Path(spec.origin).parent / "tasks"
    definitions = _Definitions()
    for name in config.evaluation.tasks:
        if name in (DEMO_TASK, *RULER_TASKS):
            continue
        if name in LEFT_OUT:
            _refuse(name, f"one of {', '.join(RULER_TASKS)}", LEFT_OUT[name])
        if not _is_defined(name, folder, definitions):
            known = [path.name for path in folder.iterdir() if path.is_dir() and path.name != name]
            inside = sorted(path.stem for path in (folder / name).glob("*.yaml"))[:3]
            close = inside or difflib.get_close_matches(name, known, n=3)
            raise ConfigError(
                f"evaluation.tasks names {name}, which lm-eval does not have",
                "lm-eval task names",
                name,
                f"did you mean {', '.join(close)}?" if close else "see `lm-eval ls tasks`",
            )
        for leaf, definition in definitions.leaves(name, [folder / name, folder]):
            check_definition(leaf, definition)


def check_definition(task: str, definition: dict[str, Any]) -> None:
    """Raise if a task of lm-eval cannot be measured.

    Args:
        task: its name.
        definition: keys and values of its YAML; values may still be text.

    Raises:
        ConfigError: it draws its answers, searches among several, or has images or code to run.
    """
    if task in LEFT_OUT:
        _refuse(task, f"one of {', '.join(RULER_TASKS)}", LEFT_OUT[task])
    if definition.get("doc_to_image") or definition.get("doc_to_audio"):
        _refuse(task, "text", "images or audio")
    if _is_true(definition.get("unsafe_code")):
        _refuse(task, "answers that are compared", "it runs the code that the model writes")
    settings = definition.get("generation_kwargs")
    settings = settings if isinstance(settings, dict) else {}
    drawn = settings.get("do_sample", float(settings.get("temperature") or 0) > 0)
    if _is_true(drawn):
        _refuse(task, "answers of the most likely tokens", "generation_kwargs that draw tokens")
    for key, value in settings.items():
        if key not in _GREEDY and (key, str(value)) != ("num_beams", "1"):
            known = ", ".join(sorted(_GREEDY))
            _refuse(task, f"generation_kwargs of {known}", f"{key}: {value}")


def _is_true(value: Any) -> bool:
    return str(value).lower() == "true"


def _refuse(task: str, expected: str, found: str) -> NoReturn:
    raise ConfigError(
        f"task {task} of evaluation.tasks cannot be measured",
        expected,
        found,
        "remove it from evaluation.tasks, or run it with lm-eval itself",
    )


def _is_defined(name: str, folder: Path, definitions: _Definitions) -> bool:
    """Return whether a name is the value of `task`, `group` or `tag`, or an entry of a list."""
    return any(
        next(definitions.files_with(name, place), None) is not None
        for place in (folder / name, folder)  # usually in the folder of that name
    )


class _Definitions:
    """lm-eval's definitions, each file read once."""

    def __init__(self):
        self.texts: dict[Path, dict[Path, bytes]] = {}
        """Content of the files of each folder."""

    def files_with(self, name: str, folder: Path) -> Iterator[Path]:
        """Yield the files below a folder that spell a name where definitions do."""
        key = rb"""['"]?(?:task|group|tag)['"]?:[ \t]*"""
        word = rb"""['"]?""" + re.escape(name.encode()) + rb"""['"]?[ \t]*(?:[,#].*)?\r?$"""
        line = rb"^[ \t]*(?:-[ \t]+(?:" + key + rb")?|" + key + rb")" + word
        pattern = re.compile(line, re.MULTILINE)
        for path, text in self._read(folder):
            if pattern.search(text):
                yield path

    def _read(self, folder: Path) -> Iterator[tuple[Path, bytes]]:
        if folder in self.texts:
            yield from self.texts[folder].items()
            return
        texts = {}
        for path in folder.rglob("*"):
            if path.suffix in ("", ".yaml", ".yml") and path.is_file():
                texts[path] = path.read_bytes()
                yield path, texts[path]
        self.texts[folder] = texts

    def leaves(
        self, name: str, places: list[Path], given: dict[str, Any] | None = None, depth: int = 0
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the tasks that a name stands for, each with its definition.

        Args:
            name: of a task, a group or a tag.
            places: folders to search, until one has the definition.
            given: keys that a group sets for its members.
            depth: number of groups around the name.
        """
        given = given or {}
        for place in places:
            found = False
            for path in self.files_with(name, place):
                document = _load(path)
                listed = document.get("task")
                if document.get("group") == name and isinstance(listed, list):
                    found = True
                    inside = [path.parent, *places]
                    yield from self._members(document, inside, given, depth)
                elif isinstance(listed, str) and (
                    listed == name or name in _as_list(document.get("tag"))
                ):
                    found = True
                    yield listed, document | given
            if found:
                return

    def _members(
        self, group: dict[str, Any], places: list[Path], given: dict[str, Any], depth: int
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        given = {key: group[key] for key in _SET_BY_GROUPS if key in group} | given
        for member in _as_list(group.get("task")) if depth < _DEEPEST else ():
            if isinstance(member, str):
                yield from self.leaves(member, places, given, depth + 1)
            elif isinstance(member.get("task"), list):
                yield from self._members(member, places, given, depth + 1)
            elif isinstance(member.get("task"), str):
                own = {key: member[key] for key in _SET_BY_GROUPS if key in member} | given
                yield from self.leaves(member["task"], places, own, depth + 1)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _load(path: Path) -> dict[str, Any]:
    """Return the keys of a definition and of what it includes; none if it cannot be read.

    Stage 04 explains what cannot be read. Values stay text, and tags such as `!function` unread.
    """
    try:
        node = yaml.compose(path.read_bytes(), Loader=yaml.SafeLoader)
    except (OSError, yaml.YAMLError):
        return {}
    document = _plain(node)
    if not isinstance(document, dict):
        return {}
    included: dict[str, Any] = {}
    names = _as_list(document.get("include")) if "include" in document else []
    for name in reversed(names):
        included |= _load(path.parent / str(name))
    return included | document


def _plain(node: Any) -> Any:
    if isinstance(node, yaml.MappingNode):
        return {str(_plain(key)): _plain(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_plain(value) for value in node.value]
    return node.value if node is not None else None
