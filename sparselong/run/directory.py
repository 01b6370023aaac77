"""The run directory: a stage with a manifest is done.

    runs/NAME/config.yaml                 resolved config of the stage that was started last
    runs/NAME/date.txt                    the day that chat templates render (data/run_date.py)
    runs/NAME/0N_stage/started.json       config of the work in progress
    runs/NAME/0N_stage/log.txt            progress, and why the stage failed
    runs/NAME/0N_stage/manifest.json      written last, atomically
    runs/NAME/0N_stage.replaced/          the previous result while --force makes a new one
    runs/NAME/0N_stage.kept-N/            files of such a result that the stage did not write
    runs/NAME/05_export/FORMAT/           a part: the same files in a directory of its own

A stage may be interrupted at any point before the manifest is written. Work that another config
began is refused; a stage that was refused before it had anything to keep counts as not begun. Stage
05 has several results, called parts, each with a manifest of its own (parts.py).
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sparselong import provenance
from sparselong.config import Config, dump
from sparselong.errors import StageError
from sparselong.files import write_atomically
from sparselong.run.changes import refuse_changed_inputs
from sparselong.run.lock import writing
from sparselong.run.log import LOG, add_to_log
from sparselong.run.manifests import (
    FORMAT_VERSION,
    MissingStage,
    hash_outputs,
    read_manifest,
    refuse_other_version,
)
from sparselong.run.own_files import has_begun, keep_others, remove_own
from sparselong.run.place import (
    MANIFEST,
    STARTED,
    check_started,
    pass_recorded,
    read_document,
    refuse_replacing_others,
    show_options,
)
from sparselong.run.progress import Display
from sparselong.run.stages import STAGES, name_changes, redo_command, stage_hash

_UNFINISHED = "unfinished work"


@dataclass
class Stage:
    """A stage being executed: its inputs, its directory and the contents of its manifest."""

    name: str
    config: Config
    run_dir: Path
    manifests: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Manifests of the stages that this one reads, by name."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Figures for the manifest, by name."""
    inputs: list[Path] = field(default_factory=list)
    sources: dict[str, Any] = field(default_factory=dict)
    """Rows of `provenance.describe_files` for the files that `data` names, by config key."""
    outputs: list[Path] = field(default_factory=list)
    """Files or directories; directories are listed file by file in the manifest."""
    described: list[dict[str, Any]] = field(default_factory=list)
    """Rows of `provenance.describe_files` for files that the stage has hashed before its end."""
    peak_bytes: dict[str, int] = field(default_factory=dict)
    """Peak memory by device: `host`, `cuda:0`, …"""
    named: Mapping[str, str] = field(default_factory=dict)
    """Fingerprint of what the list of `extended_by` names, by name."""
    date: datetime.date | None = None
    """The date that chat templates rendered, if the result depends on conversations."""
    forced: bool = False
    """Whether `--force` was passed, with which a rerun would start over once more."""
    is_renewed: bool = False
    """Whether what the part made before is of something else, and is replaced without `--force`."""
    part: str = ""
    """Name of the part, if the stage has several results, each with its own manifest."""
    options: dict[str, str] = field(default_factory=dict)
    """Options of the command line that decide the part's result, by name."""
    reads: tuple[str, ...] = ()
    """Earlier stages whose results it opens; by default those of the table."""
    layers: range | None = None
    """Layers that the command is for (`--layers`); None: all."""
    unfinished: dict[str, int] = field(default_factory=dict)
    """How far a command for some layers has come, by name; empty: the stage is done."""
    done_at: float | None = None
    """When its result was made, in seconds since 1970, if it was done before this command."""
    display: Display = field(default_factory=Display)
    """Where its progress is shown."""

    def __post_init__(self) -> None:
        self.reads = self.reads or STAGES[self.name].reads

    @property
    def dir(self) -> Path:
        """`runs/NAME/0N_stage`, or the part's directory in it."""
        return self.run_dir / self.name / self.part

    @property
    def replaced_dir(self) -> Path:
        """The previous result while `--force` makes a new one: `dir` with the suffix .replaced."""
        return self.dir.with_name(f"{self.dir.name}.replaced")

    @property
    def hash(self) -> str:
        """Hash of the config keys that affect the result."""
        return stage_hash(self.config, self.name, self.reads)

    @property
    def same_command(self) -> str:
        """The command line that continues this stage, in words."""
        return f"the same command{' without --force' if self.forced else ''}"

    @property
    def redo_command(self) -> str:
        """The command line that starts this stage or part over."""
        return redo_command(self.name, self.part, self.options)

    def note_date(self, date: datetime.date) -> None:
        """Take the date that chat templates render as that of the result.

        Raises:
            StageError: a stage that this one reads rendered another one: date.txt was removed or
                changed.
        """
        for name, manifest in self.manifests.items():
            before = manifest.get("date", date.isoformat())
            if before != date.isoformat():
                raise StageError(
                    f"{self.run_dir / 'date.txt'} has changed since {name} read it",
                    f"{before}, which {name} used",
                    date.isoformat(),
                    f"write {before} into it, or use another --run-dir",
                )
        self.date = date

    def check_rows(self, files: Iterable[Path]) -> None:
        """Raise unless prepared conversations are still those that earlier stages read.

        Raises:
            StageError: `data` was deleted and made again from a source that has changed.
        """
        for name, manifest in self.manifests.items():
            recorded = {Path(row["path"]).parts[-2:]: row for row in manifest["inputs"]}
            rows = [
                {**recorded[file.parts[-2:]], "path": file.absolute()}
                for file in files
                if file.parts[-2:] in recorded
            ]
            provenance.refuse_changes(rows, self.run_dir, name)

    def log(self, message: str) -> None:
        """Write one line to stderr and to the stage's log.txt."""
        self.display.print(message)
        add_to_log(self.dir / LOG, message)

    def report(self, what: str, done: int, total: int, note: str = "") -> None:
        """Show progress, and write it to log.txt now and then; see `Display.show`."""
        line = self.display.show(what, done, total, note)
        if line is not None:
            add_to_log(self.dir / LOG, line)


def prepare(stage: Stage, redo: bool) -> bool:
    """Prepare the stage's directory and read the manifests of its inputs.

    Args:
        stage: the stage to execute; its `manifests` are filled in.
        redo: whether to redo a finished stage.

    Returns:
        Whether the stage is up to date.

    Raises:
        StageError: a stage that this one reads is not done or was done with another config, an
            input has changed since it was read, the directory holds work for another config or
            from inputs that no longer exist, or it cannot be written. Nothing is changed then.
    """
    refuse_replacing_others(stage.run_dir, stage.name, stage.part)
    manifest, present = (None, None) if redo else _read_present(stage)
    if manifest and _has_all(stage, manifest):
        return True
    read_inputs(stage)
    beginning = {
        "format_version": FORMAT_VERSION,
        "config_hash": stage.hash,
        "config": stage.config.model_dump(mode="json"),
        "made_from": _made_from(stage),
        **_describe_part(stage),
    }
    with writing(stage.dir):
        told = _set_aside(stage) if redo and stage.dir.exists() else []
        if manifest:  # it lacks what is asked for in addition
            (stage.dir / MANIFEST).unlink()
        if present not in (None, beginning) and not has_begun(stage.dir, stage.name):
            remove_own(stage.dir, stage.name, stage.part)  # another config's preparations
        stage.dir.mkdir(parents=True, exist_ok=True)
        (stage.dir / LOG).open("a", encoding="utf-8").close()
        write_atomically(stage.dir / STARTED, json.dumps(beginning))
        write_atomically(stage.run_dir / "config.yaml", dump(stage.config))
    for sentence in told:
        stage.log(sentence)
    return False


def _has_all(stage: Stage, manifest: dict[str, Any]) -> bool:
    """Return whether a finished stage has what the list of `extended_by` names, as it is now."""
    return stage.named.items() <= manifest.get("named", {}).items()


def read_inputs(stage: Stage) -> None:
    """Read the manifests of the stages that this one reads into `stage.manifests`.

    Raises:
        StageError: one is not done or was done with another config, or an input has changed since
            it was read.
    """
    stage.manifests = {name: _require(stage, name) for name in stage.reads}
    refuse_changed_inputs(stage.config, stage.run_dir, stage.manifests)


def _read_present(stage: Stage) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Return the manifest of a finished stage, and it or what else says how it was begun.

    Raises:
        StageError: it is other work, or its files or inputs have changed since.
    """
    manifest = read_manifest(stage.run_dir, stage.name, stage.part)
    present = manifest or read_document(stage.dir / STARTED)
    if present is not None and (manifest or has_begun(stage.dir, stage.name)):
        _refuse_other_work(stage, present, "a result" if manifest else _UNFINISHED)
    if manifest:
        _refuse_changed_files(stage, manifest)
    return manifest, present


def check_begun(stage: Stage) -> Literal["finished", "unfinished", "new"]:
    """Return how far the stage is; raise StageError as `prepare` does, and change nothing.

    Earlier stages that are not done yet are allowed.
    """
    manifest, present = _read_present(stage)
    for name in () if manifest else stage.reads:
        if read_manifest(stage.run_dir, name) is not None:
            _require(stage, name)
    return "finished" if manifest else "new" if present is None else "unfinished"


def check_finished(stage: Stage) -> None:
    """Raise if the stage is done with this config, but from inputs that have changed since.

    Of a part, raise StageError as `prepare` does, but for earlier stages that are not done yet.
    """
    if stage.part:
        refuse_replacing_others(stage.run_dir, stage.name, stage.part)
        _read_present(stage)
        return
    manifest = read_document(stage.dir / MANIFEST)
    if manifest is not None and manifest.get("config_hash") == stage.hash:
        manifest = read_manifest(stage.run_dir, stage.name, stage.part) or {}
        _refuse_changed_files(stage, manifest)


def _refuse_changed_files(stage: Stage, manifest: dict[str, Any]) -> None:
    """Raise if what a finished stage or an earlier one read has changed since.

    A part's results are compared too. Those of other stages are by the stage that reads them.
    """
    earlier = {name: read_manifest(stage.run_dir, name) for name in stage.reads}
    manifests = {name: found for name, found in earlier.items() if found is not None}
    refuse_changed_inputs(stage.config, stage.run_dir, {**manifests, stage.name: manifest})
    if stage.part:
        name = f"{stage.name}/{stage.part}"
        fix = f"redo it: {stage.redo_command}"
        provenance.refuse_changes(manifest["outputs"], stage.run_dir, name, fix)


def _require(stage: Stage, name: str) -> dict[str, Any]:
    """Return the manifest of a stage that this one reads; raise unless it is of this config."""
    manifest = read_manifest(stage.run_dir, name)
    if manifest is None:
        raise MissingStage(stage.name, name, stage.run_dir)
    if manifest["config_hash"] != stage_hash(stage.config, name):
        raise StageError(
            f"{name} in {stage.run_dir} was made with another config",
            *name_changes(stage.config, name, manifest),
            f"{pass_recorded(stage.run_dir, name, manifest)}, or another --run-dir, or redo it: "
            f"python {name}.py --force",
        )
    return manifest


def _made_from(stage: Stage) -> dict[str, str | None]:
    """Return a hash of the output files of each stage that this one reads; None if not done."""
    earlier = {name: read_manifest(stage.run_dir, name) for name in stage.reads}
    return {name: hash_outputs(found) if found else None for name, found in earlier.items()}


def _refuse_other_work(stage: Stage, present: dict[str, Any], kind: str) -> None:
    """Raise if the stage's directory holds work for another config or from other inputs."""
    refuse_other_version(stage.dir, present)
    check_started(stage.dir / (STARTED if kind == _UNFINISHED else MANIFEST), present)
    begun = {key: present.get(key) for key in ("part", "options")}
    if stage.part and begun != _describe_part(stage):
        raise StageError(
            f"{stage.dir} holds {kind} that was made with other options",
            show_options(**_describe_part(stage)),
            show_options(**begun),
            "pass what it was made with, or move the directory elsewhere to keep it, or redo it: "
            f"{stage.redo_command}",
        )
    if present["config_hash"] != stage.hash:
        raise StageError(
            f"{stage.dir} holds {kind} of another config",
            *name_changes(stage.config, stage.name, present, stage.reads),
            f"{pass_recorded(stage.run_dir, stage.name, present, stage.reads)}, or another "
            "--run-dir to keep it, or --force to redo this stage",
        )
    before = present.get("made_from", {})
    for name, now in _made_from(stage).items():
        if before.get(name) is not None and before[name] != now:
            raise StageError(
                f"{stage.dir} was made from a result of {name} that no longer exists",
                f"the files of {name} from which it was made",
                "different files" if now else "no finished result",
                f"redo this stage: {stage.redo_command}",
            )


def _describe_part(stage: Stage) -> dict[str, Any]:
    """Return the part's keys of manifest.json and started.json."""
    return {"part": stage.part, "options": stage.options} if stage.part else {}


def _set_aside(stage: Stage) -> list[str]:
    """Move a finished result aside until a new one replaces it; delete unfinished work.

    Returns:
        What is to be told about files that the stage did not write, which are kept.
    """
    told = []
    if (stage.dir / MANIFEST).exists():
        if stage.replaced_dir.exists():
            told.append(keep_others(stage.replaced_dir, stage.name, stage.part))
        stage.dir.rename(stage.replaced_dir)
    else:
        told.append(keep_others(stage.dir, stage.name, stage.part))
    return [sentence for sentence in told if sentence]


def _remove_replaced(stage: Stage) -> None:
    """Remove the previous result, which a new one has replaced."""
    before = stage.replaced_dir
    try:
        kept = keep_others(before, stage.name, stage.part) if before.exists() else None
    except OSError as error:  # the new result is whole
        kept = f"{before} could not be removed: {error.strerror or error}"
    if kept:
        stage.log(kept)


def finish(stage: Stage, seconds: float) -> dict[str, Any]:
    """Write the manifest, which marks the stage as done, and return it."""
    earlier = (row for manifest in stage.manifests.values() for row in manifest["outputs"])
    known = [*earlier, *stage.described]
    inputs = provenance.describe_files(stage.inputs, stage.run_dir, known)
    outputs = provenance.describe_files(stage.outputs, stage.run_dir, [*known, *inputs])
    manifest = {
        "format_version": FORMAT_VERSION,
        "stage": stage.name,
        "status": "done",
        **_describe_part(stage),
        "config_hash": stage.hash,
        "made_from": _made_from(stage),
        "config": stage.config.model_dump(mode="json"),
        "inputs": inputs,
        **({"sources": stage.sources} if stage.sources else {}),
        "outputs": outputs,
        **provenance.describe_software(),
        "hardware": provenance.describe_hardware(),
        "seed": stage.config.seed,
        **({"named": dict(stage.named)} if stage.named else {}),
        **({"date": stage.date.isoformat()} if stage.date else {}),
        "seconds": round(seconds, 3),
        "peak_bytes": stage.peak_bytes,
        "metrics": stage.metrics,
    }
    write_atomically(stage.dir / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    _remove_replaced(stage)
    return manifest
