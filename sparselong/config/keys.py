"""Groups of keys: strict sections, dotted keys in nested values, and what is said of a wrong one.

The schema itself is in config.py; nothing here knows its keys.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from sparselong.errors import ConfigError


@dataclass(frozen=True)
class Incidental:
    """Marks a key that decides no result, in the key's `Annotated`.

    No tensor depends on its value, and figures only in how often they are written down. So it may
    change when a run continues, and the stages' hashes leave it out.
    """


class Section(BaseModel):
    """A frozen group of keys; what it does not know, it refuses."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


def set_key(values: dict, dotted: str, value: Any, *, keep: bool = False) -> None:
    """Sets a dotted key in nested dicts; with `keep`, only where it is not set yet."""
    *parents, last = dotted.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            return  # a section given as a scalar: validation names it
    if not (keep and last in values):
        values[last] = value


def fill_sections(values: dict, section: type[Section]) -> None:
    """A section whose keys are all commented out reads as null: it means no key, not no section."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            if name in values and values[name] is None:
                values[name] = {}
            if isinstance(values.get(name), dict):
                fill_sections(values[name], field.annotation)


def known_keys(section: type[Section], prefix: str = "") -> dict[str, type[Section]]:
    """All dotted keys, sections included, with the class that declares each."""
    keys: dict[str, type[Section]] = {}
    for name, field in section.model_fields.items():
        keys[prefix + name] = section
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys |= known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def is_incidental(field: FieldInfo) -> bool:
    """Return whether a key is declared to decide no result."""
    return any(isinstance(mark, Incidental) for mark in field.metadata)


def deciding_values(section: Section) -> dict[str, Any]:
    """Return a section's values as plain JSON, without the keys that decide no result."""
    values = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if is_incidental(field):
            del values[name]
        elif isinstance(value, Section):
            values[name] = deciding_values(value)
    return values


def refuse(
    error: ValidationError,
    schema: type[Section],
    source: str,
    lines: dict[tuple[str, ...], int],
) -> ConfigError:
    """The first of pydantic's complaints as a four-line error with the key and its line.

    Args:
        schema: what the values were checked against.
        source: the file's name.
        lines: the line of each key in it.
    """
    known = known_keys(schema)
    first = error.errors()[0]
    path = tuple(str(part) for part in first["loc"] if not isinstance(part, int))
    unknown = first["type"] == "extra_forbidden"
    while path and not unknown and ".".join(path) not in known:
        path = path[:-1]  # pydantic appends the name of a union's branch
    dotted = ".".join(path)
    where = f"{source}, line {lines[path]}" if path in lines and path else source
    if unknown:
        close = difflib.get_close_matches(dotted, known, n=1, cutoff=0.5)
        if not close:
            ends = {key.rsplit(".", 1)[-1]: key for key in known}
            close = [ends[k] for k in difflib.get_close_matches(path[-1], ends, n=1, cutoff=0.5)]
        near = f"did you mean {close[0]}?" if close else "see configs/schema.json for all keys"
        return ConfigError(f"unknown key {dotted} ({where})", "a known key", dotted, near)
    message = first["msg"].removeprefix("Value error, ")
    field = known[dotted].model_fields[path[-1]] if dotted in known else None
    fix = f"{dotted}: {' '.join((field.description or '').split())}" if field else "change one"
    found = f"{first['input']!r}" if dotted else "the values above"
    return ConfigError(f"{dotted or 'config'} is not valid ({where})", message, found, fix)
