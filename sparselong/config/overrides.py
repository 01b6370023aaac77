"""`key.path=value` arguments of the command line, which override a config file.

What follows the equals sign is the value. For a key that holds a string it is taken as it is, so
that `model.base=/data/base #2` and `model.revision=1e5` need no quotes; quotes would be part of it.
The exceptions are `null`, for a key that may be null (a file of that name is `./null`), and a list
`[{…}]`, for a key that may be one. For any other key the value is read as YAML. A program's last
value for a key is used; a command line that gives two is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from sparselong.config import yaml12
from sparselong.config.keys import Section, known_keys, set_key
from sparselong.config.refusals import refuse_unknown
from sparselong.config.texts import is_optional, is_text, is_text_or_list
from sparselong.errors import ConfigError

_KEY = r"[A-Za-z_][\w.]*"


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return words that are paths, and those that are overrides: `key.path=value`.

    A path may have an equals sign, too: the runs of a sweep do.
    """
    overrides = [word for word in words if re.match(rf"{_KEY}=", word) and not os.path.exists(word)]
    return [word for word in words if word not in overrides], overrides


def refuse_repeated(overrides: Sequence[str]) -> None:
    """Raise if a later argument of a command line would replace an earlier one's value.

    Raises:
        ConfigError: a key has two values, or its section is set after it.
    """
    for number, override in enumerate(overrides):
        key, _, value = override.partition("=")
        for earlier in overrides[:number]:
            other, _, before = earlier.partition("=")
            if (other == key and before != value) or other.startswith(f"{key}."):
                raise ConfigError(
                    f"{other} is set twice on the command line",
                    "one value for each key",
                    f"{earlier} and {override}",
                    "leave out one of the two",
                )


def apply_overrides(
    values: dict[str, Any],
    overrides: Sequence[str],
    schema: type[Section],
    places: dict[tuple[str, ...], str],
) -> None:
    """Set the overridden keys in nested values.

    Args:
        values: the file's values.
        overrides: the arguments, in their order.
        schema: the model of the whole config.
        places: where each key path was set, for messages; is updated.

    Raises:
        ConfigError: an argument is not `key.path=value`, its key is unknown or its value no YAML.
    """
    known = known_keys(schema)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not re.fullmatch(_KEY, key):
            raise ConfigError(
                f"override {override!r} is malformed",
                "key.path=value, for example training.max_steps=20",
                override,
                "quote it if the shell splits it",
            )
        if key not in known:
            raise refuse_unknown(key, schema, f"override {override!r}")
        path = tuple(key.split("."))
        set_key(values, key, _value(text, key, known[key].model_fields[path[-1]].annotation))
        for each in [each for each in places if each[: len(path)] == path]:
            del places[each]
        places[path] = f"override {key}"


def _value(text: str, key: str, annotation: Any) -> Any:
    if is_text(annotation) or (is_text_or_list(annotation) and not text.startswith("[{")):
        return None if text == "null" and is_optional(annotation) else text
    return yaml12.parse(text, f"override {key}")[0] if text else ""
