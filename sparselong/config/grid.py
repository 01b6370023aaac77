"""`KEY=VALUE,VALUE` arguments of the command line: the values that a sweep gives to a key.

Commas separate values, except inside of brackets, braces and quotes: `lora.r=8,16` has two values,
`lora.target_modules=[q_proj,k_proj],[v_proj]` too. Each value is read like that of an override
(overrides.py). A string that holds a comma or a quote is put into quotes, which are not part of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sparselong.config.keys import Section, known_keys
from sparselong.config.refusals import refuse_unknown
from sparselong.config.schema import Config
from sparselong.config.texts import is_text, is_text_or_list
from sparselong.errors import ConfigError

_CLOSING = {"[": "]", "{": "}"}
_QUOTES = "\"'"


def read_grid(items: Sequence[str]) -> dict[str, list[str]]:
    """Return the override texts of each key: for `lora.r=8,16`, `lora.r=8` and `lora.r=16`.

    Args:
        items: the arguments, in their order.

    Raises:
        ConfigError: an argument is not `KEY=VALUE,VALUE`, its key is unknown, a section or
            repeated, or a value is missing or has a bracket or quote that is not closed.
    """
    known, grid = known_keys(Config), {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals:
            raise _refuse(item, "KEY=VALUE,VALUE, for example lora.r=8,16", item)
        if key not in known:
            raise refuse_unknown(key, Config, f"--sweep {item}")
        field = known[key].model_fields[key.rpartition(".")[2]]
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            raise _refuse(item, f"a key of the section {key}, such as lora.r", key)
        if key in grid:
            raise _refuse(item, "each key once, with all its values", f"{key} twice")
        values = list(_split(item, text))
        if is_text(field.annotation) or is_text_or_list(field.annotation):
            values = [_unquote(value) for value in values]
        grid[key] = [f"{key}={value}" for value in values]
    return grid


def _split(item: str, text: str) -> Iterator[str]:
    """Yield the values of a text."""
    value, open_until, quote = "", [], ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in _QUOTES:
            quote = character
        elif character in _CLOSING:
            open_until.append(_CLOSING[character])
        elif character in _CLOSING.values():
            if not open_until or open_until.pop() != character:
                raise _refuse(item, f"an opening bracket before {character}", text)
        elif character == "," and not open_until:
            yield _checked(item, value)
            value = ""
            continue
        value += character
    if quote or open_until:
        raise _refuse(item, f"a closing {quote or open_until[-1]}", text)
    yield _checked(item, value)


def _checked(item: str, value: str) -> str:
    if not value.strip():
        raise _refuse(item, "a value before and after each comma", "an empty value")
    return value.strip()


def _unquote(value: str) -> str:
    is_quoted = len(value) > 1 and value[0] in _QUOTES and value[-1] == value[0]
    return value[1:-1] if is_quoted else value


def _refuse(item: str, expected: str, found: str) -> ConfigError:
    fix = "quote the argument if the shell splits it, and a value that holds a comma or a bracket"
    return ConfigError(f"--sweep {item} cannot be read", expected, found, fix)
