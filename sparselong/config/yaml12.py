"""Strict YAML: YAML 1.2 scalars, the line of every key, and no repeated keys.

PyYAML reads YAML 1.1, where `2:4` is the number 124, `1e-4` is a string and the last of two equal
keys silently wins. Only the scalar rules and the walk over PyYAML's node tree are ours.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from sparselong.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Loader with the scalars of YAML 1.2's core schema."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first
    )

_Loader.add_constructor(  # PyYAML's default reads 010 as an octal number
    "tag:yaml.org,2002:int", lambda _loader, node: int(node.value)
)


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes a string if YAML 1.1 or 1.2 would read it as something else."""


_Dumper.yaml_implicit_resolvers = {
    first: [
        *yaml.SafeDumper.yaml_implicit_resolvers.get(first, ()),
        *_Loader.yaml_implicit_resolvers.get(first, ()),
    ]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
}


def dump(values: dict[str, Any]) -> str:
    """Return YAML text of plain values, which `parse` reads back to equal values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _read(node: yaml.Node, path: tuple[str, ...], lines: dict[tuple[str, ...], int]) -> Any:
    """Convert a YAML node to plain values, recording key lines and rejecting repeated keys."""
    lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        values = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            if key in values:
                raise ConfigError(
                    f"key {'.'.join((*path, key))} is repeated (line "
                    f"{key_node.start_mark.line + 1})",
                    "every key at most once",
                    f"also on line {lines[(*path, key)]}",
                    "remove one of the two",
                )
            values[key] = _read(value_node, (*path, key), lines)
            lines[(*path, key)] = key_node.start_mark.line + 1
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_read(item, path, lines) for item in node.value]
    value = _Loader("").construct_object(node)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise yaml.constructor.ConstructorError(
        None, None, f"{node.tag} is not a plain value", node.start_mark
    )


def parse(text: str, source: str) -> tuple[Any, dict[tuple[str, ...], int]]:
    """Convert YAML text to plain values, and return the line number of every key path too.

    Raises:
        ConfigError: the text is not YAML or repeats a key.
    """
    lines: dict[tuple[str, ...], int] = {}
    try:
        node = yaml.compose(text, Loader=_Loader)
        return ({} if node is None else _read(node, (), lines)), lines
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: a tag that its value does not fit, or an integer of thousands of digits.
        raise ConfigError(
            f"{source} is not valid YAML",
            "key: value lines",
            " ".join(str(error).split()),
            "correct that line",
        ) from error
