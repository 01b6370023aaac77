"""What was asked: the config, first the keys that differ from their defaults."""

from __future__ import annotations

import json
from typing import Any

from sparselong.config import PROFILES, Config, leaves
from sparselong.report.elements import Markup, element, folded, note, pairs, table
from sparselong.report.source import Run


def asked(run: Run) -> list[Markup]:
    """Return the config that the finished stages were made with."""
    profile = str(run.config.get("profile", ""))
    values = dict(leaves(run.config))
    usual = dict(leaves(Config().model_dump(mode="json"))) | PROFILES.get(profile, {})
    changed = {key: value for key, value in values.items() if value != usual.get(key)}
    rows = [
        [element("code", key), _text(value), _text(usual[key]) if key in usual else "no such key"]
        for key, value in changed.items()
        if key != "profile"
    ]
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, rest = key.rpartition(".")
        sections.setdefault(section or "run", {})[rest] = _text(value)
    everything = [[element("h4", name), pairs(found)] for name, found in sections.items()]
    return [
        note(f"Profile {profile}. Keys that differ from its defaults:"),
        table(["key", "value", "default"], rows, texts=3) if rows else note("none"),
        folded(
            "All keys",
            element("div", (element("div", one) for one in everything), class_="columns"),
        ),
    ]


def _text(value: Any) -> str:
    """Return a value as in the config file."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
