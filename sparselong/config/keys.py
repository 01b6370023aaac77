"""Config sections: strict models, and dotted keys in nested values.

The schema itself is in schema.py; nothing here knows its keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo


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
        fix: what to do; without it, to change a key that the message names.
    """

    def __init__(self, key: str, message: str, fix: str = ""):
        super().__init__(message)
        self.key, self.fix = key, fix


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
