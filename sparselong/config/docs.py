"""Generate the comments in configs/*.yaml, and configs/schema.json, from the schema.

`python -m sparselong.config.docs` regenerates both. A test fails if they are out of date.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from sparselong.config.keys import Section, is_incidental
from sparselong.config.schema import Config, load_with_source


def _scalar(value: Any) -> str:
    return (
        yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
    )


def _render(section: type[Section], config: Section, explicit: dict, indent: str) -> list[str]:
    rows: list[str] = []
    for name, field in section.model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Section):
            comment = field.description or type(value).__doc__ or ""
            rows += ["", f"{indent}# {comment.splitlines()[0]}", f"{indent}{name}:"]
            rows += _render(type(value), value, explicit.get(name) or {}, indent + "  ")
            continue
        if name == "sequence_len" and not indent:
            rows.append("")
        words = " ".join((field.description or "").split())
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        if choices:
            words += f" Choices: {', '.join(map(str, choices))}."
        if is_incidental(field):
            words += " May be changed when resuming a run."
        rows += [f"{indent}# {line}" for line in _wrap(words, 98 - len(indent))]
        shown = config.model_dump(mode="json")[name] if isinstance(value, tuple) else value
        if name in explicit:
            rows.append(f"{indent}{name}: {_scalar(shown)}")
        else:
            rows.append(f"{indent}#{name}: {_scalar(shown)}")
    return rows


def _wrap(words: str, width: int) -> list[str]:
    lines = [""]
    for word in words.split():
        if len(lines[-1]) + len(word) + 1 > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def render(path: Path) -> str:
    """Return the file's text with generated comments.

    Keys that the file does not set are commented out and show their default value.
    """
    config, explicit = load_with_source(path)
    head = [
        "# yaml-language-server: $schema=schema.json",
        "# Comments and commented-out keys are generated: python -m sparselong.config.docs",
    ]
    return "\n".join(head + _render(Config, config, explicit, "")) + "\n"


def schema_text() -> str:
    """Return the JSON schema of a config file, for editors."""
    return json.dumps(Config.model_json_schema(), indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    """Regenerate the comments in the shipped config files, and configs/schema.json."""
    folder = Path(__file__).resolve().parents[2] / "configs"
    for path in sorted(folder.glob("*.yaml")):
        path.write_text(render(path), encoding="utf-8")
        print(path.name, file=sys.stderr)
    (folder / "schema.json").write_text(schema_text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
