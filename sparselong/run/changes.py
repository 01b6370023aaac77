"""Whether what a config names is still what finished stages read.

A stage's hash covers names, not contents. Without this, a stage whose base or rows were replaced
under the same name would be up to date, and its figures would be those of other inputs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparselong.config import Config
from sparselong.provenance import are_rows, refuse_changes
from sparselong.run.stages import STAGES, redo_command

_COMPRESS = "02_compress"


def refuse_changed_inputs(
    config: Config, run_dir: Path, manifests: Mapping[str, Mapping[str, Any]]
) -> None:
    """Raise if an input that is still there is no longer the one that a stage read.

    A file with the recorded size and time is not read. Inputs that were deleted are allowed, as is
    a base of the hub, whose revision does not change.

    Args:
        config: names the inputs.
        run_dir: the run directory.
        manifests: of the stages whose inputs are compared, by name.

    Raises:
        StageError: a file has changed; names it and the stage from which on to redo.
    """
    for name, manifest in manifests.items():
        for path, row in _named(config, run_dir, name, manifest):
            if os.path.exists(path):
                at = {**row, "path": os.path.abspath(path)}
                first = Path(row["path"]).parts[0]
                fix = None
                if first == name:  # what a part read of another one, which may have been redone
                    again = redo_command(name, manifest.get("part", ""), manifest.get("options"))
                    fix = f"redo it: {again}"
                if first == "data" and path == run_dir / row["path"]:
                    fix = f"delete {run_dir / 'data'} and redo all stages: python 02_compress.py "
                    fix += "--force"
                refuse_changes([at], run_dir, first if first in STAGES else name, fix)


def _named(
    config: Config, run_dir: Path, name: str, manifest: Mapping[str, Any]
) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Yield where each recorded input is by the config's names, and its row."""
    rows = manifest["inputs"]
    for row in rows:
        if Path(row["path"]).parts[:1] in {("data",), *((stage,) for stage in STAGES)}:
            yield run_dir / row["path"], row
    for key, row in (manifest.get("sources") or {}).items():
        if are_rows([row]) and key in config.data.named:
            yield Path(config.data.named[key]), row
    if name == _COMPRESS:
        yield from _base_rows(config, run_dir, rows)


def _base_rows(
    config: Config, run_dir: Path, rows: list[Mapping[str, Any]]
) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Yield the files of a base that is a directory; those beside its config.json are the base's.

    The name may lead elsewhere than when stage 02 read it, so names inside of it are compared.
    """
    base = config.model.base
    folder = run_dir / "base" if base == "tiny" else Path(base)
    configs = [Path(row["path"]) for row in rows if Path(row["path"]).name == "config.json"]
    if not configs or not os.path.isdir(folder):
        return
    for row in rows:
        if Path(row["path"]).is_relative_to(configs[0].parent):
            yield folder / Path(row["path"]).relative_to(configs[0].parent), row
