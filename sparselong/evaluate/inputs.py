"""Whether the models to measure are still those that earlier stages recorded. No torch."""

from __future__ import annotations

import os
from pathlib import Path

from sparselong.checkpoint import check_recorded, take_inventory
from sparselong.run import Stage

COMPRESS, FINETUNE = "02_compress", "03_finetune"


def check_models(stage: Stage) -> None:
    """Raise unless all models, a base of the hub excepted, are the files that were recorded.

    Raises:
        StageError: a file was changed, removed or added since, or a model is ambiguous.
    """
    base = stage.config.model.base
    local = stage.run_dir / "base" if base == "tiny" else Path(base)
    if os.path.isdir(local):
        check_base(stage, local)
    for name in (COMPRESS, FINETUNE):
        inventory = take_inventory(stage.run_dir / name / "model")
        check_recorded(inventory, stage.manifests[name]["outputs"], name)


def check_base(stage: Stage, directory: Path) -> None:
    """Raise unless the base in a directory is the one that stage 02 compressed.

    Raises:
        StageError: a file was changed, removed or added since, or the base is ambiguous.
    """
    rows = stage.manifests[COMPRESS]["inputs"]
    check_recorded(take_inventory(directory), rows, COMPRESS)
