"""The run directory and its promises: one process at a time, a manifest means done.

    runs/NAME/config.yaml                 as resolved for the stage that began last
    runs/NAME/0N_stage/started.json       the config hash that work in progress belongs to
    runs/NAME/0N_stage/log.txt            progress, and why the stage failed
    runs/NAME/0N_stage/manifest.json      written last, atomically
    runs/NAME/0N_stage.replaced/          the earlier result, while --force makes a new one

Everything before the manifest may be interrupted at any moment.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparselong import provenance
from sparselong.config import Config, dump
from sparselong.errors import StageError
from sparselong.files import is_disk_full, write_atomically
from sparselong.run.stages import STAGES, stage_hash

FORMAT_VERSION = 1


@dataclass
class Stage:
    """A stage at work: what it builds on, where it writes and what its manifest will say."""

    name: str
    config: Config
    run_dir: Path
    manifests: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The manifests of the stages that this one reads, by name."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """The keys that architecture.md promises for this stage."""
    inputs: list[Path] = field(default_factory=list)
    outputs: list[Path] = field(default_factory=list)
    """Files or directories; directories are listed file by file in the manifest."""
    peak_bytes: dict[str, int] = field(default_factory=dict)
    """Peak memory by device: `host`, `cuda:0`, …"""

    @property
    def dir(self) -> Path:
        """`runs/NAME/0N_stage`."""
        return self.run_dir / self.name

    @property
    def replaced_dir(self) -> Path:
        """`runs/NAME/0N_stage.replaced`: the earlier result while `--force` makes a new one."""
        return self.run_dir / f"{self.name}.replaced"

    def log(self, message: str) -> None:
        """Write one line to stderr and to the stage's log.txt."""
        print(message, file=sys.stderr, flush=True)
        with (self.dir / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")


def read_manifest(run_dir: Path, name: str) -> dict[str, Any] | None:
    """Return the stage's manifest, or None if the stage is not done."""
    return _read(run_dir / name / "manifest.json")


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Make the run directory and hold its lock, which the system releases however the process ends.

    Raises:
        StageError: another process holds the lock, or the directory cannot be made or written.
    """
    with _writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("a+", encoding="utf-8")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise StageError(
                f"run directory {run_dir} is in use",
                "one process at a time in a run directory",
                f"process {file.read().strip() or 'unknown'} holds its lock",
                "wait for it to end, or pass another --run-dir",
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Explain why files in a directory cannot be made; a full disk is explained by the caller."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise
        raise StageError(
            f"{directory} cannot be made or written",
            "a directory that this user can make and write",
            f"{error.strerror or type(error).__name__}: {error.filename or directory}",
            "pass another --run-dir, or change what is there",
        ) from error


def prepare(stage: Stage, redo: bool) -> bool:
    """Make the stage's directory ready and read the manifests that it builds on.

    Args:
        redo: whether to do a finished stage again.

    Returns:
        Whether the stage is done already.

    Raises:
        StageError: a stage that this one reads is not done or was done with another config, what is
            in the directory belongs to another config or to results that are gone, or the
            directory cannot be written. Nothing is changed then.
    """
    manifest = None if redo else read_manifest(stage.run_dir, stage.name)
    started = stage.dir / "started.json"
    present = manifest or (None if redo else _read(started))
    if present:
        _refuse_other_work(stage, present, "a result" if manifest else "unfinished work")
    if manifest:
        return True
    stage.manifests = {name: _require(stage, name) for name in STAGES[stage.name].reads}
    beginning = {
        "config_hash": stage_hash(stage.config, stage.name),
        "made_from": _made_from(stage),
    }
    with _writing(stage.dir):
        if redo and stage.dir.exists():
            _set_aside(stage)
        stage.dir.mkdir(parents=True, exist_ok=True)
        write_atomically(started, json.dumps(beginning))
        write_atomically(stage.run_dir / "config.yaml", dump(stage.config))
    return False


def _require(stage: Stage, name: str) -> dict[str, Any]:
    """Return the manifest of a stage that this one reads, made with this config."""
    manifest = read_manifest(stage.run_dir, name)
    if manifest is None:
        raise StageError(
            f"{stage.name} needs {name}, which is not done in {stage.run_dir}",
            f"{stage.run_dir / name / 'manifest.json'}",
            "no manifest",
            f"run python {name}.py with the same --config and --run-dir first",
        )
    wanted = stage_hash(stage.config, name)
    if manifest["config_hash"] != wanted:
        raise StageError(
            f"{name} in {stage.run_dir} was made with another config",
            f"config hash {wanted}",
            manifest["config_hash"],
            f"use another --run-dir, or redo it: python {name}.py --force",
        )
    return manifest


def _made_from(stage: Stage) -> dict[str, str | None]:
    """Return a hash of the output files of each stage that this one reads, None where not done.

    Redoing an earlier stage to the same bytes changes nothing.
    """
    hashes: dict[str, str | None] = {}
    for name in STAGES[stage.name].reads:
        manifest = read_manifest(stage.run_dir, name)
        listed = json.dumps(manifest["outputs"]) if manifest else ""
        hashes[name] = hashlib.sha256(listed.encode()).hexdigest() if manifest else None
    return hashes


def _refuse_other_work(stage: Stage, present: dict[str, Any], kind: str) -> None:
    """Raise if what is in the stage's directory is not of this config and of what it reads."""
    wanted = stage_hash(stage.config, stage.name)
    if present["config_hash"] != wanted:
        raise StageError(
            f"{stage.dir} holds {kind} of another config",
            f"config hash {wanted}",
            present["config_hash"],
            "pass another --run-dir to keep it, or --force to redo this stage",
        )
    before = present.get("made_from", {})
    for name, now in _made_from(stage).items():
        if before.get(name) is not None and before[name] != now:
            raise StageError(
                f"{stage.dir} builds on a result of {name} that is not there any more",
                f"the files of {name} as they were",
                "others" if now else "no finished result",
                f"redo this stage: python {stage.name}.py --force",
            )


def _set_aside(stage: Stage) -> None:
    """Make room for redoing the stage; a finished result is kept until there is a new one."""
    if read_manifest(stage.run_dir, stage.name) is None:
        shutil.rmtree(stage.dir)
        return
    shutil.rmtree(stage.replaced_dir, ignore_errors=True)
    stage.dir.rename(stage.replaced_dir)


def finish(stage: Stage, seconds: float) -> dict[str, Any]:
    """Write the manifest, which makes the stage done, and return it."""
    manifest = {
        "format_version": FORMAT_VERSION,
        "stage": stage.name,
        "status": "done",
        "config_hash": stage_hash(stage.config, stage.name),
        "made_from": _made_from(stage),
        "inputs": provenance.describe_files(stage.inputs, stage.run_dir),
        "outputs": provenance.describe_files(stage.outputs, stage.run_dir),
        **provenance.describe_software(),
        "hardware": provenance.describe_hardware(),
        "seed": stage.config.seed,
        "seconds": round(seconds, 3),
        "peak_bytes": stage.peak_bytes,
        "metrics": stage.metrics,
    }
    write_atomically(stage.dir / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    shutil.rmtree(stage.replaced_dir, ignore_errors=True)
    return manifest
