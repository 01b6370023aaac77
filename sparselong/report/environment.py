"""Where the stages ran: versions and hardware, and whether they differ between stages."""

from __future__ import annotations

import json
from typing import Any

from sparselong.report.elements import (
    MISSING,
    Child,
    Markup,
    folded,
    note,
    pairs,
    show_bytes,
    table,
)
from sparselong.report.source import Run


def environment(run: Run) -> list[Markup]:
    """Return the machine and versions of each stage; once if they are all the same."""
    facts = {name: _facts(manifest) for name, manifest in run.manifests.items()}
    groups: dict[str, list[str]] = {}
    for name, found in facts.items():
        groups.setdefault(json.dumps(found), []).append(name)
    blocks = []
    if len(groups) > 1:
        told = "The stages did not all run in the same environment."
        blocks.append(note(told, kind="warning"))
    for text, names in groups.items():
        found = json.loads(text)
        blocks.append(pairs({"Stages": ", ".join(names), **found}))
    return [*blocks, folded("Package versions", _versions(run))]


def _facts(manifest: dict[str, Any]) -> dict[str, str]:
    hardware = manifest.get("hardware", {})
    commit = str(manifest.get("git_commit") or MISSING)
    return {
        "Processor": f"{hardware.get('machine', MISSING)}, {hardware.get('cpu_count')} cores",
        "Host memory": show_bytes(hardware.get("host_bytes")),
        "GPUs": "; ".join(hardware.get("gpus", [])) or "none",
        "Commit": f"{commit[:12]}, with changes" if manifest.get("git_dirty") else commit[:12],
        "Seed": str(manifest.get("seed", MISSING)),
    }


def _versions(run: Run) -> Markup:
    """Return the packages' versions; a column for each set of versions that stages had."""
    columns: dict[str, list[str]] = {}
    for name, manifest in run.manifests.items():
        columns.setdefault(json.dumps(manifest.get("versions", {})), []).append(name)
    sets = [json.loads(text) for text in columns]
    names = dict.fromkeys(name for versions in sets for name in versions)
    rows: list[list[Child]] = [[name, *(v.get(name, MISSING) for v in sets)] for name in names]
    head = [
        "package",
        *(["version"] if len(sets) == 1 else [", ".join(c) for c in columns.values()]),
    ]
    return table(head, rows, texts=len(head))
