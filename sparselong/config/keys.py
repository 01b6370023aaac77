"""Config sections: strict models, dotted keys in nested values, and errors for invalid keys.

The schema itself is in schema.py; nothing here knows its keys.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from sparselong.config.texts import UTF8_FIX
from sparselong.errors import ConfigError


@dataclass(frozen=True)
class Incidental:
    """Mark, in a key's `Annotated`, that the key does not affect results.

    Results agree up to the order of sums; logged figures may cover other windows. The key may
    therefore be changed when resuming a run, and the stages' hashes omit it.
    """


class KeyFault(ValueError):
    """A value that does not fit other keys, raised while a section is validated.

    Args:
        key: the dotted key to change.
        message: what is expected.
    """

    def __init__(self, key: str, message: str):
        super().__init__(message)
        self.key = key


class Section(BaseModel):
    """A frozen group of keys that rejects unknown ones."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


def set_key(values: dict, dotted: str, value: Any, *, keep: bool = False) -> None:
    """Set a dotted key in nested dicts; with `keep`, an existing value is kept."""
    *parents, last = dotted.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            return  # a section given as a scalar, which validation will report
    if not (keep and last in values):
        values[last] = value


def fill_sections(values: dict, section: type[Section]) -> None:
    """Replace null by an empty section: a section reads as null if all keys are commented out."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            if name in values and values[name] is None:
                values[name] = {}
            if isinstance(values.get(name), dict):
                fill_sections(values[name], field.annotation)


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key of nested values that is not a section, with its value."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def known_keys(section: type[Section], prefix: str = "") -> dict[str, type[Section]]:
    """Return every dotted key, sections included, with the class that declares it."""
    keys: dict[str, type[Section]] = {}
    for name, field in section.model_fields.items():
        keys[prefix + name] = section
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys |= known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def is_incidental(field: FieldInfo) -> bool:
    """Return whether a key is declared not to affect results."""
    return any(isinstance(mark, Incidental) for mark in field.metadata)


def deciding_values(section: Section) -> dict[str, Any]:
    """Return a section's values as plain JSON, without the keys that do not affect results."""
    values = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if is_incidental(field):
            del values[name]
        elif isinstance(value, Section):
            values[name] = deciding_values(value)
    return values


def pick_sections(section: Section, keys: Iterable[str]) -> dict[str, Any]:
    """Return the values of some of a section's keys that affect results, as plain JSON."""
    values = deciding_values(section)
    return {key: values[key] for key in sorted(keys) if key in values}


def refuse(
    error: ValidationError,
    schema: type[Section],
    source: str,
    places: dict[tuple[str, ...], str],
) -> ConfigError:
    """Convert pydantic's first complaint to a four-line error with the key and its line.

    Args:
        error: pydantic's complaints.
        schema: the model that the values were checked against.
        source: the file's name.
        places: where each key path was set: file and line, or an override.
    """
    known = known_keys(schema)
    first = error.errors()[0]
    fault = first.get("ctx", {}).get("error")
    path = tuple(str(part) for part in first["loc"] if not isinstance(part, int))
    within = first["loc"][-1] if any(isinstance(part, int) for part in first["loc"]) else None
    unknown, found = first["type"] == "extra_forbidden" and within is None, first["input"]
    if isinstance(fault, KeyFault):
        path = tuple(fault.key.split("."))
        found = _value_at(found, path)
    while path and not unknown and ".".join(path) not in known:
        path = path[:-1]  # pydantic appends the name of the union branch
    dotted = ".".join(path)
    where = places.get(path, source) if path else source
    if unknown:
        return refuse_unknown(dotted, schema, where)
    # A key that takes values of several types has a complaint for each of them.
    place = (first["loc"][: len(path)], found)
    same = [e["msg"] for e in error.errors() if (e["loc"][: len(path)], e["input"]) == place]
    same = same or [first["msg"]]  # a KeyFault is placed elsewhere
    message = " or: ".join(dict.fromkeys(same)).removeprefix("Value error, ")
    if isinstance(within, str):  # a key of a section in a list
        message = f"{within}: {message}"
    if first["type"] == "date_type":
        message = "a date in the format YYYY-MM-DD, such as 2026-01-31"
    field = known[dotted].model_fields[path[-1]] if dotted in known else None
    fix = f"{dotted}: {' '.join((field.description or '').split())}" if field else "change one"
    return ConfigError(f"{dotted or 'config'} is not valid ({where})", message, f"{found!r}", fix)


def refuse_undecodable(
    values: dict, schema: type[Section], source: str, places: dict[tuple[str, ...], str]
) -> None:
    """Raise if a string holds bytes that are not UTF-8, which neither JSON nor a manifest can.

    Raises:
        ConfigError: names the key.
    """
    for key in known_keys(schema):
        value = _value_at(values, tuple(key.split(".")))
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not text.isascii():
                try:
                    text.encode()
                except UnicodeEncodeError:
                    raise ConfigError(
                        f"{key} is not valid ({places.get(tuple(key.split('.')), source)})",
                        "text in UTF-8",
                        ascii(text),
                        UTF8_FIX,
                    ) from None


def _value_at(values: Any, path: tuple[str, ...]) -> Any:
    """Return a nested value; None if it is not set."""
    for part in path:
        values = values.get(part) if isinstance(values, dict) else None
    return values


def refuse_unknown(dotted: str, schema: type[Section], where: str) -> ConfigError:
    """Return the error for an unknown dotted key, with the closest known one."""
    known = known_keys(schema)
    close = difflib.get_close_matches(dotted, known, n=1, cutoff=0.5)
    if not close:
        ends = {key.rsplit(".", 1)[-1]: key for key in known}
        last = dotted.rsplit(".", 1)[-1]
        close = [ends[k] for k in difflib.get_close_matches(last, ends, n=1, cutoff=0.5)]
    near = f"did you mean {close[0]}?" if close else "see configs/schema.json for all keys"
    return ConfigError(f"unknown key {dotted} ({where})", "a known key", dotted, near)
