"""Errors for invalid keys and values: pydantic's complaints in this project's words.

What is expected follows from the type of the complaint, and the fix is an example: the closest
choice, the values that were given as a list, or the key's default. Nothing here knows the keys.
"""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import ValidationError

from sparselong.config.keys import KeyFault, Section, known_keys
from sparselong.config.texts import UTF8_FIX
from sparselong.errors import ConfigError

_Complaint = Mapping[str, Any]
_DATE = "2026-01-31"
_EXPECTED = {
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
    "finite_number": "a finite number",
    "too_short": "a list with at least {min_length} item",
    **dict.fromkeys(
        ("date_type", "date_parsing", "date_from_datetime_parsing", "date_from_datetime_inexact"),
        f"a date in the format YYYY-MM-DD, such as {_DATE}",
    ),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("tuple_type", "list_type"), "a list"),
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "keys with values"),
    "string_type": "a text",
    "none_required": "null",
    "missing": "a value, which every one needs",
}
"""What is expected, by pydantic's type of complaint and with its limits."""


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
    complaints = error.errors()
    first = complaints[0]
    fault, found, loc = first.get("ctx", {}).get("error"), first["input"], first["loc"]
    path = tuple(str(part) for part in loc if not isinstance(part, int))
    in_list = any(isinstance(part, int) for part in loc)
    if isinstance(fault, KeyFault):
        path = tuple(fault.key.split("."))
        found = _value_at(found, path)
    elif first["type"] == "extra_forbidden" and not in_list:
        dotted = ".".join(path)
        return refuse_unknown(dotted, schema, places.get(path, source))
    while path and ".".join(path) not in known:
        path = path[:-1]  # pydantic appends the name of the union branch
    dotted = ".".join(path)
    where = places.get(path, source) if path else source
    if first["type"] == "extra_forbidden":
        return _refuse_unknown_in(dotted, loc[-1], known[dotted].model_fields[path[-1]], where)
    what = f"{dotted or 'config'} is not valid ({where})"
    if isinstance(fault, KeyFault):
        return ConfigError(what, str(fault), f"{found!r}", fault.fix or _other_keys(fault, known))
    # A key that takes values of several types has a complaint for each of them.
    place = (loc[: len(path)], found)
    same = [each for each in complaints if (each["loc"][: len(path)], each["input"]) == place]
    message = " or: ".join(dict.fromkeys(map(_expected, same)))
    if in_list and isinstance(loc[-1], str) and loc[-1] not in ("several", "one"):
        message = f"{loc[-1]}: {message}"  # a key of a section in a list
    if dotted not in known:
        return ConfigError(what, message, f"{found!r}", "see configs/")
    like = [each for each in complaints if each["type"] == first["type"]]
    like = [each["input"] for each in like if each["loc"][: len(path)] == loc[: len(path)]]
    field = known[dotted].model_fields[path[-1]]
    return ConfigError(what, message, f"{found!r}", _example(dotted, field, same, like))


def _expected(complaint: _Complaint) -> str:
    """Return what one complaint expects."""
    limits = complaint.get("ctx", {})
    if complaint["type"] == "literal_error":
        return str(limits["expected"])
    if complaint["type"] in _EXPECTED:
        return _EXPECTED[complaint["type"]].format_map({k: _number(v) for k, v in limits.items()})
    return complaint["msg"].removeprefix("Value error, ")


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _example(dotted: str, field: Any, same: Sequence[_Complaint], values: Sequence[Any]) -> str:
    """Return the fix for a value that is not valid: an override that is.

    Args:
        dotted: the key.
        field: its field.
        same: the complaints about the first value that is not valid.
        values: the values at or inside of the key with the same complaint.
    """
    kinds = {each["type"] for each in same}
    inner = _section_of(field.annotation)
    choices = [str(each) for each in _choices(field.annotation)]
    if inner is not None and same[0]["loc"][-1] != dotted.rpartition(".")[2]:
        names = list(map(str, values)) if kinds & {"model_type", "model_attributes_type"} else []
        number = str(same[0]["loc"][-1]) if kinds & {"float_type", "greater_than"} else ""
        shown = show_sections(inner, names or ["a.jsonl", "b.jsonl"], number)
        return f"for example {shlex.quote(f'{dotted}={shown}')}"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, tuple):
        given = [str(each) for each in values if isinstance(each, str | int)]
        given = [each for each in given if not choices or each in choices]
        return f"for example {dotted}={_show((given or choices or list(default))[:1])}"
    if same[0]["type"].startswith("date"):
        return f"for example {dotted}={_DATE}"
    near = difflib.get_close_matches(str(same[0]["input"]), choices, n=1)
    if near:
        return f"did you mean {dotted}={near[0]}?"
    if isinstance(default, Section):
        key = next(iter(type(default).model_fields))
        return f"for example {dotted}.{key}={_show(getattr(default, key))}"
    return f"for example {dotted}={_show(default)}, the default"


def show_sections(section: type[Section], values: Sequence[str], number: str = "") -> str:
    """Return a list of sections on a command line, each with one of the values for its first key.

    Args:
        section: the sections' class.
        values: of the first key of each.
        number: another key, which then is 1 in each.
    """
    key, more = next(iter(section.model_fields)), f", {number}: 1" if number else ""
    return f"[{', '.join(f'{{{key}: {value}{more}}}' for value in values)}]"


def _show(value: Any) -> str:
    """Return a value as an override gives it."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_show, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def _section_of(annotation: Any) -> type[Section] | None:
    """Return the class of the sections that a list holds; None if it holds none."""
    for part in get_args(annotation):
        if isinstance(part, type) and issubclass(part, Section):
            return part
        found = _section_of(part)
        if found is not None:
            return found
    return None


def _choices(annotation: Any) -> list[Any]:
    """Return the choices of a key, or of the items of a list; none if any value may do."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    parts = get_args(annotation)
    parts = parts[:1] if get_origin(annotation) is Annotated else parts
    return [choice for part in parts for choice in _choices(part)]


def _other_keys(fault: KeyFault, known: Mapping[str, type[Section]]) -> str:
    """Return the fix for values that do not fit one another: to change one of those named."""
    words = [word.strip(",;:()") for word in str(fault).split()]
    named = dict.fromkeys([fault.key, *(word for word in words if word in known and "." in word)])
    return f"change {' or '.join(named)}"


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
    """Return the error for an unknown dotted key, with the closest known ones."""
    known = known_keys(schema)
    close = difflib.get_close_matches(dotted, known, n=3, cutoff=0.5)
    if not close:
        ends = {key.rsplit(".", 1)[-1]: key for key in known}
        last = dotted.rsplit(".", 1)[-1]
        close = [ends[k] for k in difflib.get_close_matches(last, ends, n=3, cutoff=0.5)]
    return _unknown(dotted, dotted, close, where)


def _refuse_unknown_in(dotted: str, name: Any, field: Any, where: str) -> ConfigError:
    """Return the error for an unknown key of a section in a list."""
    inner = _section_of(field.annotation)
    names = list(inner.model_fields) if inner is not None else []
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    return _unknown(f"{name} in {dotted}", str(name), close, where, " or ".join(names))


def _unknown(what: str, found: str, close: list[str], where: str, known: str = "") -> ConfigError:
    """Return the error for an unknown key; `known` names all keys where they are few."""
    similar = f", such as {', '.join(close)}" if close else ""
    near = f"did you mean {close[0]}?" if close else "see configs/schema.json for all keys"
    expected = known or f"a known key{similar}"
    return ConfigError(f"unknown key {what} ({where})", expected, found, near)
