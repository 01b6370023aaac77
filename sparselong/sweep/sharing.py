"""A run's stage 02, taken from another run directory where it was made with the same keys.

What stage 02 left is linked or copied: its own directory, the prepared data, the small base model,
and the date that chat templates rendered. Weights are hard links where the file system has them:
no stage writes into such a file. Everything else is copied. The manifest's paths are relative to
the run directory, and links and copies keep the files' times, so that stage 03 compares the files
with what stage 02 recorded, as in any run.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from sparselong.config import Config
from sparselong.files import copy_atomically, link_file
from sparselong.provenance import refuse_changes
from sparselong.run import locked, read_manifest, stage_hash, writing

COMPRESS = "02_compress"
_DATE = "date.txt"
_SHARED = (_DATE, "data", "base", COMPRESS)
"""What a run takes over, stage 02 last: its manifest says that it is there."""


def find_compressed(config: Config, run_dir: Path, places: Iterable[Path]) -> Path | None:
    """Return the run directory whose stage 02 a run uses; None if it makes its own.

    Args:
        config: the run's config.
        run_dir: the run directory. If stage 02 has begun there, it continues there.
        places: other run directories. The first one whose stage 02 is finished with the same keys
            is taken.
    """
    own = _find(config, [run_dir])
    return own if own or (run_dir / COMPRESS).exists() else _find(config, places)


def _find(config: Config, places: Iterable[Path]) -> Path | None:
    wanted = stage_hash(config, COMPRESS)
    for place in places:
        manifest = read_manifest(place, COMPRESS)
        if manifest is not None and manifest["config_hash"] == wanted:
            return place
    return None


def take_compressed(origin: Path, run_dir: Path) -> None:
    """Give a run the stage 02 of another one, unless it has the parts already.

    Raises:
        StageError: the other run is in use, its files have changed since stage 02 recorded them, or
            the run directory cannot be written.
    """
    with locked(origin):
        manifest = read_manifest(origin, COMPRESS)
        assert manifest is not None, "found to be finished"
        refuse_changes(manifest["outputs"], origin, COMPRESS)
        with writing(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            for name in _SHARED:
                source, target = origin / name, run_dir / name
                if source.exists() and not target.exists():
                    partial = run_dir / f".{name}.partial"
                    _take(source, partial)
                    partial.rename(target)


def take_date(places: Iterable[Path], run_dir: Path) -> None:
    """Give a run the date that the other ones' chat templates render, if they have one."""
    if (run_dir / _DATE).exists():
        return
    for place in places:
        if (place / _DATE).exists():
            with writing(run_dir):
                run_dir.mkdir(parents=True, exist_ok=True)
                copy_atomically(place / _DATE, run_dir / _DATE)
            return


def _take(source: Path, partial: Path) -> None:
    """Link or copy a file or directory to a name that may be left over from a killed process."""
    if partial.is_dir():
        shutil.rmtree(partial)
    if source.is_dir():
        shutil.copytree(source, partial, symlinks=True, copy_function=_link_or_copy)
    else:
        shutil.copy2(source, partial)


def _link_or_copy(source: str, target: str) -> str:
    if not (source.endswith(".safetensors") and link_file(Path(source), Path(target))):
        shutil.copy2(source, target)
    return target
