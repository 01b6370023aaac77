"""`hub`: exports of this run in one repository of the Hugging Face Hub, with a model card.

It uploads the forms that are named beside it, which are made first, or all finished ones if it
stands alone. The published form is at the root of the repository, so that tools find it by the
repository's name; each other form has a directory of its own name. Manifests and logs, which have
paths of this machine, are not uploaded, and an adapter's config names a local base without its
directory.

Without a token or a network everything else is done: the card is in 05_export/hub, the stage fails,
and the same command uploads later.

A run may upload to one repository after another, and more forms after the first ones: `--force` is
needed only to replace files of a repository. What the run uploaded before is then replaced in
05_export/hub, and stays on the hub.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparselong.errors import ConfigError, StageError
from sparselong.export.adapter import BASE_KEY, CONFIG
from sparselong.export.form import Work
from sparselong.export.inputs import ORIGIN
from sparselong.files import is_local, load_json, read_json, write_atomically
from sparselong.provenance import are_rows, refuse_changes
from sparselong.run import Stage, read_manifest, redo_command

HUB, REPO = "hub", "repo"
"""Name of the format, and the option that names the repository."""
CARD = "README.md"
_AT_ROOT = "mxfp4"
_ADAPTER_CONFIG = f"adapter/{CONFIG}"
_SAME = ("config_hash", "made_from")


class HubFormat:
    """A repository with exports and a model card."""

    name = HUB
    summary = "the exports in a repository of the hub, with a model card"

    def check(self, stage: Stage) -> None:
        """Raise unless the option names a repository."""
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # pyright: ignore

        repo = stage.options[REPO]
        found = "letters beyond ASCII" if "/" in repo else "no owner"
        try:
            validate_repo_id(repo)
        except HFValidationError as error:
            found = " ".join(str(error).split())
        else:
            if "/" in repo and repo.isascii():
                return
        raise ConfigError(
            f"--{REPO} {ascii(repo)[1:-1]} is not the name of a repository",
            "OWNER/NAME: an account or organization of the hub, and a name",
            found,
            f"for example --{REPO} me/my-gpt-oss",
        )

    def plan(self, stage: Stage) -> Work:
        """Return the bytes of the finished exports to upload."""
        return plan_upload(stage, {})

    def write(self, stage: Stage) -> None:
        """Write the model card, after checking that the exports are those of this run."""
        from sparselong.export.hub.card import write_card

        manifests = {form: _read_export(stage, form) for form in _forms(stage)}
        stage.inputs = [stage.run_dir / row["path"] for row in _rows(manifests)]
        stage.described += _rows(manifests)
        write_atomically(stage.dir / CARD, write_card(stage, manifests))
        stage.log(f"the model card is {stage.dir / CARD}")

    def verify(self, stage: Stage) -> dict[str, Any]:
        """Upload the files, and compare those of the repository with them."""
        from sparselong.export.hub.repository import upload

        manifests = {form: _read_export(stage, form) for form in _forms(stage)}
        files: dict[str, Path | bytes] = {CARD: stage.dir / CARD}
        for form, manifest in manifests.items():
            placed = _place(stage, form, manifest)
            if CARD in placed:
                stage.log(f"{placed.pop(CARD)} is not uploaded: the model card has that name")
            files |= placed
        if _ADAPTER_CONFIG in files:
            files[_ADAPTER_CONFIG] = _without_path(stage)
        return upload(stage, stage.options[REPO], files)


def plan_upload(stage: Stage, made: Mapping[str, int]) -> Work:
    """Return the bytes to upload, all of which are read and hashed first.

    Args:
        stage: the part.
        made: bytes of the exports that the same command makes first, by format.
    """
    total = 0
    for form in _forms(stage):
        manifest = None if form in made else read_manifest(stage.run_dir, stage.name, form)
        total += manifest["metrics"]["bytes"] if manifest else made.get(form, 0)
    return Work(0, 2 * total, uploaded_bytes=total)


def list_finished(run_dir: Path, stage: str, origin: str, names: list[str]) -> list[str]:
    """Return the names of the formats that a run has exported.

    Args:
        run_dir: the run directory.
        stage: name of the stage.
        origin: the model that they must be of, a key of `ORIGINS`.
        names: of the formats in question.
    """
    found = {name: read_manifest(run_dir, stage, name) for name in names if name != HUB}
    return [name for name, one in found.items() if one and one["options"].get(ORIGIN) == origin]


def _without_path(stage: Stage) -> bytes:
    """Return adapter_config.json with a local base named without its directory."""
    config = read_json(stage.run_dir / stage.name / _ADAPTER_CONFIG)
    path = config["base_model_name_or_path"]
    if is_local(path):
        name = os.path.basename(os.path.normpath(path))
        config["base_model_name_or_path"] = config[BASE_KEY]["name"] = name
        stage.log(f"{_ADAPTER_CONFIG} on the hub names the base {name}, without its path here")
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def compare_earlier(run_dir: Path, stage: str, options: Mapping[str, str]) -> tuple[bool, bool]:
    """Compare an upload with the one that a run made, or began, before.

    Args:
        run_dir: the run directory.
        stage: name of the stage.
        options: of the upload to be made.

    Returns:
        Whether it is another one: to another repository, of other forms, or of forms that were
        made again since; and whether it goes to another repository.
    """
    earlier: dict[str, Any] = {}
    for name in ("started.json", "manifest.json"):
        try:
            earlier |= load_json(run_dir / stage / HUB / name)
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            return False, False  # the run refuses it, or replaces it with --force
    before = earlier.get("options")
    if not isinstance(before, dict):
        return False, False
    is_elsewhere = before.get(REPO) != options[REPO]
    is_other = before.get("to") != options["to"] or not _has_uploaded(run_dir, earlier)
    return is_elsewhere or is_other, is_elsewhere


def _has_uploaded(run_dir: Path, earlier: dict[str, Any]) -> bool:
    """Return whether an upload's exports are still the finished ones; true if it is unfinished."""
    rows = earlier.get("inputs", [])
    if not rows or not are_rows(rows):
        return True
    folders = {Path(row["path"]).parts[:2] for row in rows}
    exports = [read_manifest(run_dir, *folder) for folder in folders]
    found = [row for one in exports for row in (one or {}).get("outputs", [])]
    return _hashes(found) == _hashes(rows)


def _hashes(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {row["path"]: row["sha256"] for row in rows}


def _forms(stage: Stage) -> list[str]:
    return stage.options["to"].split()[:-1]


def _read_export(stage: Stage, form: str) -> dict[str, Any]:
    """Return an export's manifest.

    Raises:
        StageError: it is not done, is of another model, or was changed since.
    """
    name, origin = f"{stage.name}/{form}", stage.options[ORIGIN]
    manifest = read_manifest(stage.run_dir, stage.name, form)
    options = {**(manifest["options"] if manifest else {}), ORIGIN: origin}
    redo = redo_command(stage.name, form, options)
    wanted = read_json(stage.dir / "started.json")
    if (
        manifest is None
        or manifest["options"] != options
        or any(manifest.get(key) != wanted[key] for key in _SAME)
    ):
        raise StageError(
            f"{stage.run_dir / name} is not an export of the model that would be described",
            f"a finished export of the {origin} model of this run, with this config",
            "another model's" if manifest else "no manifest",
            f"make it again: {redo}",
        )
    refuse_changes(manifest["outputs"], stage.run_dir, name, f"make it again: {redo}")
    return manifest


def _rows(manifests: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for manifest in manifests.values() for row in manifest["outputs"]]


def _place(stage: Stage, form: str, manifest: dict[str, Any]) -> dict[str, Path]:
    """Return the files of an export by their paths in the repository."""
    folder = Path(stage.name, form)
    names = [Path(row["path"]).relative_to(folder) for row in manifest["outputs"]]
    root = Path() if form == _AT_ROOT else Path(form)
    return {(root / name).as_posix(): stage.run_dir / folder / name for name in names}
