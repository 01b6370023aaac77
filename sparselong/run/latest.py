"""Names of finished models for people: `models/latest`, and one with profile and time.

Runs keep the directory that their config names, so that the same command continues them. What
stage 03 has finished gets a link in the folder `models` beside `runs` (or beside the run directory,
if that is not in a folder `runs`):

    models/NAME-PROFILE-20260131-235959 -> ../runs/NAME/03_finetune/model
    models/latest                       -> the one that finished last

A run that is redone has its new name alone, since the earlier model is gone.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from sparselong.files import point_to
from sparselong.run.directory import Stage

_STAGE, _LATEST = "03_finetune", "latest"


def models_folder(run_dir: Path) -> Path:
    """Return the folder of the links to finished models of a run directory."""
    parent = run_dir.absolute().parent
    return (parent.parent if parent.name == "runs" else parent) / "models"


def name_model(stage: Stage) -> None:
    """Point to the model of a finished stage 03, for convenience only; other stages have none."""
    if stage.name != _STAGE:
        return
    folder = models_folder(stage.run_dir)
    try:
        folder.mkdir(exist_ok=True)
        target = os.path.relpath(stage.dir.absolute() / "model", folder)
        for link in folder.iterdir():
            if link.name != _LATEST and link.is_symlink() and os.readlink(link) == target:
                link.unlink()
    except OSError as error:
        stage.log(f"{folder} has no link to the model: {error.strerror} (only a convenience)")
        return
    now = time.strftime("%Y%m%d-%H%M%S")
    for name in (f"{stage.run_dir.absolute().name}-{stage.config.profile}-{now}", _LATEST):
        point_to(folder / name, target, stage.log)
