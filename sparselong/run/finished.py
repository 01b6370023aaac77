"""What a run has finished, and what it was made with and from. Nothing here changes a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparselong.run.manifests import hash_outputs, read_manifest
from sparselong.run.place import MANIFEST
from sparselong.run.stages import STAGES

Manifests = Mapping[str, dict[str, Any]]
"""By stage, or by stage and part as in `05_export/gguf`."""


def read_finished(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Return the manifests of finished stages and parts, in the order of the table of stages.

    Raises:
        StageError: one cannot be read, is damaged, or is of another version.
    """
    found = {}
    for name, declaration in STAGES.items():
        parts = _parts(run_dir / name) if declaration.parts else [""]
        for part in parts:
            manifest = read_manifest(run_dir, name, part)
            if manifest is not None:
                found[f"{name}/{part}" if part else name] = manifest
    return found


def _parts(folder: Path) -> list[str]:
    """Return the names of directories with a manifest; a result that is being replaced has one."""
    names = (path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
    return sorted(name for name in names if not name.endswith(".replaced"))


def config_of(manifests: Manifests) -> dict[str, Any]:
    """Return a run's config, each section as the stage whose result it affects was made with."""
    found: dict[str, Any] = {}
    for manifest in manifests.values():
        found = dict(manifest.get("config", {}))
    for name, declaration in STAGES.items():
        recorded = manifests.get(name, {}).get("config", {})
        if name != "01_health":  # its sections are all, and it decides no result
            found |= {key: recorded[key] for key in declaration.sections if key in recorded}
    return found


def find_outdated(manifests: Manifests) -> list[tuple[str, str]]:
    """Return (stage, earlier stage) if the stage was made from a result that was replaced since."""
    return [
        (name, earlier)
        for name, manifest in manifests.items()
        for earlier, made_from in manifest.get("made_from", {}).items()
        if earlier in manifests and made_from not in (None, hash_outputs(manifests[earlier]))
    ]
