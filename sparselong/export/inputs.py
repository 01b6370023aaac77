"""What is exported, and whether it is still what earlier stages recorded. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparselong.checkpoint import check_recorded, missing_files, take_inventory
from sparselong.memory import find_config
from sparselong.provenance import refuse_changes
from sparselong.run import Stage

COMPRESS, FINETUNE = "02_compress", "03_finetune"
ORIGIN = "from"
"""The option that names the model to export."""
ORIGINS = {"finetuned": (COMPRESS, FINETUNE), "compressed": (COMPRESS,)}
"""Stages that are read for each model; the last one made it."""


def origin_of(stage: Stage) -> str:
    """Return the name of the stage whose model is exported."""
    return ORIGINS[stage.options[ORIGIN]][-1]


def model_directory(stage: Stage) -> Path:
    """Return the directory of the model that is exported."""
    return stage.run_dir / origin_of(stage) / "model"


def check_model_files(stage: Stage) -> None:
    """Raise unless the model consists of the files that its stage recorded.

    Raises:
        StageError: a file was changed, removed or added since, or the model is ambiguous.
    """
    name = origin_of(stage)
    check_recorded(take_inventory(model_directory(stage)), stage.manifests[name]["outputs"], name)


def find_base(stage: Stage) -> Path | None:
    """Return the base checkpoint's directory after comparing it with what stage 02 read.

    Returns:
        The directory, or None if the base is no longer on this machine.

    Raises:
        StageError: a file was changed, removed or added since.
    """
    config = stage.config.model
    found = find_config(config)
    folder = stage.run_dir / "base" if config.base == "tiny" else found and found.parent
    if folder is None or not os.path.isdir(folder) or missing_files(folder):
        return None
    check_recorded(take_inventory(folder), stage.manifests[COMPRESS]["inputs"], COMPRESS)
    return folder


def base_rows(stage: Stage) -> dict[str, dict[str, Any]]:
    """Return the rows of the base's files in stage 02's manifest, by name in the base."""
    rows = stage.manifests[COMPRESS]["inputs"]
    folder = next(Path(r["path"]).parent for r in rows if Path(r["path"]).name == "config.json")
    inside = [row for row in rows if Path(row["path"]).is_relative_to(folder)]
    return {Path(row["path"]).relative_to(folder).as_posix(): row for row in inside}


def check_outputs(stage: Stage, folder: Path) -> None:
    """Raise unless the files of a folder are as the stage that wrote it recorded them.

    Raises:
        StageError: a file was changed or removed since.
    """
    inside = folder.relative_to(stage.run_dir)
    rows: Iterable[dict[str, Any]] = stage.manifests[inside.parts[0]]["outputs"]
    chosen = [row for row in rows if Path(row["path"]).is_relative_to(inside)]
    refuse_changes(chosen, stage.run_dir, inside.parts[0])
