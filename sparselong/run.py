"""One run directory, one command line, one manifest per stage.

Every numbered script is the same program around one function: read the config, lock the run
directory, see whether this stage is done already, do it, and write `manifest.json` last. The
manifest's presence means done; everything before it may be interrupted at any moment.

    runs/NAME/config.yaml                 as resolved
    runs/NAME/0N_stage/started.json       the config hash that work in progress belongs to
    runs/NAME/0N_stage/log.txt            progress, and why the stage failed
    runs/NAME/0N_stage/manifest.json      written last, atomically
    runs/NAME/0N_stage.replaced/          the earlier result, while --force makes a new one

A stage's hash covers the config sections that it and the stages before it read, so that changing a
training key leaves a compressed model valid and changing a compression key does not.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparselong import provenance
from sparselong.config import Config
from sparselong.config import schema as config_module
from sparselong.errors import ConfigError, ExpectedError, StageError
from sparselong.files import write_atomically

DEFAULT_CONFIG = "configs/gpt-oss-120b-4x3090.yaml"
FORMAT_VERSION = 1

_COMPRESS_KEYS = (
    *("seed", "model", "shared_dense", "experts", "calibration", "data", "flash_attention"),
    *("attention_backend", "deterministic"),
)
_FINETUNE_KEYS = (
    *_COMPRESS_KEYS,
    *("sequence_len", "micro_batch_size", "lora", "finetuning_modifiers", "training"),
)
STAGE_KEYS: dict[str, tuple[str, ...]] = {
    "01_health": tuple(Config.model_fields),
    "02_compress": _COMPRESS_KEYS,
    "03_finetune": _FINETUNE_KEYS,
    "04_eval": (*_FINETUNE_KEYS, "evaluation"),
}
"""Config keys whose values decide each stage's result, those of earlier stages included.

Over how many GPUs a sequence is split, and how they exchange keys, decides nothing: a run may go on
with another number of them."""


@dataclass
class Stage:
    """A stage at work: where it writes and what its manifest will say."""

    name: str
    config: Config
    run_dir: Path
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
        """One line to stderr and to the stage's log.txt."""
        print(message, file=sys.stderr, flush=True)
        with (self.dir / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")

    def require(self, name: str) -> dict[str, Any]:
        """The manifest of an earlier stage of this run, made with this config.

        Raises:
            StageError: the stage is not done, or was done with other values of keys it reads.
        """
        manifest = read_manifest(self.run_dir, name)
        if manifest is None:
            raise StageError(
                f"{self.name} needs {name}, which is not done in {self.run_dir}",
                f"{self.run_dir / name / 'manifest.json'}",
                "no manifest",
                f"run python {name}.py with the same --config and --run-dir first",
            )
        wanted = stage_hash(self.config, name)
        if manifest["config_hash"] != wanted:
            raise StageError(
                f"{name} in {self.run_dir} was made with another config",
                f"config hash {wanted}",
                manifest["config_hash"],
                f"use another --run-dir, or redo it: python {name}.py --force",
            )
        return manifest


def stage_hash(config: Config, name: str) -> str:
    """The hash of the config sections that decide the stage's result."""
    return config_module.hash_sections(config, STAGE_KEYS[name])


def made_from(run_dir: Path, name: str) -> dict[str, str | None]:
    """What this stage builds on: a hash of each earlier stage's output files, None where not done.

    Redoing an earlier stage to the same bytes changes nothing.
    """
    hashes: dict[str, str | None] = {}
    for earlier in STAGE_KEYS:
        if "01_health" < earlier < name:
            manifest = read_manifest(run_dir, earlier)
            listed = json.dumps(manifest["outputs"]) if manifest else ""
            hashes[earlier] = hashlib.sha256(listed.encode()).hexdigest() if manifest else None
    return hashes


def read_manifest(run_dir: Path, name: str) -> dict[str, Any] | None:
    """The stage's manifest, or None when the stage is not done."""
    path = run_dir / name / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Holds the run directory's lock; the system releases it however the process ends."""
    with (run_dir / ".lock").open("a+", encoding="utf-8") as file:
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


def _set_aside(stage: Stage) -> None:
    """Makes room for redoing the stage; a finished result is kept until there is a new one."""
    if read_manifest(stage.run_dir, stage.name) is None:
        shutil.rmtree(stage.dir)
        return
    shutil.rmtree(stage.replaced_dir, ignore_errors=True)
    stage.dir.rename(stage.replaced_dir)


def _prepare(stage: Stage, redo: bool) -> bool:
    """Makes the stage's directory ready; True when the stage is done already."""
    wanted, started = stage_hash(stage.config, stage.name), stage.dir / "started.json"
    if redo and stage.dir.exists():
        _set_aside(stage)
    manifest = read_manifest(stage.run_dir, stage.name)
    present = manifest or (json.loads(started.read_text()) if started.exists() else None)
    if present and present["config_hash"] != wanted:
        raise StageError(
            f"{stage.dir} holds {'a result' if manifest else 'unfinished work'} of another config",
            f"config hash {wanted}",
            present["config_hash"],
            "pass another --run-dir to keep it, or --force to redo this stage",
        )
    earlier = made_from(stage.run_dir, stage.name)
    for name, before in (present or {}).get("made_from", {}).items():
        if before is not None and before != earlier[name]:
            raise StageError(
                f"{stage.dir} builds on a result of {name} that is not there any more",
                f"the files of {name} as they were",
                "others" if earlier[name] else "no finished result",
                f"redo this stage: python {stage.name}.py --force",
            )
    if manifest:
        return True
    stage.dir.mkdir(parents=True, exist_ok=True)
    write_atomically(started, json.dumps({"config_hash": wanted, "made_from": earlier}))
    write_atomically(stage.run_dir / "config.yaml", config_module.dump(stage.config))
    return False


def _finish(stage: Stage, seconds: float) -> dict[str, Any]:
    manifest = {
        "format_version": FORMAT_VERSION,
        "stage": stage.name,
        "status": "done",
        "config_hash": stage_hash(stage.config, stage.name),
        "made_from": made_from(stage.run_dir, stage.name),
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


def parse_arguments(name: str, description: str, argv: list[str] | None) -> argparse.Namespace:
    """The command line that every script shares."""
    parser = argparse.ArgumentParser(prog=f"{name}.py", description=description)
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="YAML file (default %(default)s)")
    parser.add_argument("--run-dir", type=Path, help="default runs/<name of the config file>")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="config overrides")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, touch nothing")
    parser.add_argument("--force", action="store_true", help="redo a finished stage")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.run_dir is None:
        arguments.run_dir = Path("runs") / Path(arguments.config).stem
    return arguments


def run_stage(
    name: str,
    description: str,
    argv: list[str] | None,
    execute: Callable[[Stage], None],
    plan: Callable[[Config, Path, str], dict[str, Any]],
    show_plan: Callable[[dict[str, Any]], str],
    keep_result: bool = True,
) -> int:
    """Runs one stage as a command line program.

    Args:
        execute: does the work and fills the stage's metrics, inputs and outputs.
        plan: (config, run directory, stage name) → what `--dry-run` prints; touches nothing.
        show_plan: renders the plan for a person.
        keep_result: a finished stage is not done again; false for what is only true for now.

    Returns:
        0 done or nothing to do, 1 the stage failed, 2 usage or config error.
    """
    arguments = parse_arguments(name, description, argv)
    redo = arguments.force or not keep_result
    with _explained_failures(name, arguments) as outcome:
        config = config_module.load(arguments.config, arguments.overrides)
        if arguments.dry_run:
            document = plan(config, arguments.run_dir, name)
            text = show_plan(document)
        else:
            document = _run_locked(Stage(name, config, arguments.run_dir), redo, execute)
            text = show_manifest(document)
        print(json.dumps(document, indent=1) if arguments.json else text, flush=True)
    return outcome.exit_code


def _run_locked(stage: Stage, redo: bool, execute: Callable[[Stage], None]) -> dict[str, Any]:
    stage.run_dir.mkdir(parents=True, exist_ok=True)
    with _locked(stage.run_dir):
        if _prepare(stage, redo):
            stage.log(f"{stage.name} is done already in {stage.run_dir} with this config")
            return read_manifest(stage.run_dir, stage.name) or {}
        start = time.monotonic()
        execute(stage)
        return _finish(stage, time.monotonic() - start)


def show_manifest(manifest: dict[str, Any]) -> str:
    """A finished stage in a few lines: its scalar figures, and how long it took."""
    rows = [f"{manifest['stage']} {manifest['status']} in {manifest['seconds']:.1f} s"]
    for key, value in manifest["metrics"].items():
        if isinstance(value, dict) and all(not isinstance(v, (dict, list)) for v in value.values()):
            value = ", ".join(f"{name} {number}" for name, number in value.items())
        if not isinstance(value, (dict, list)):
            rows.append(f"  {key}: {value}")
    return "\n".join(rows)


@dataclass
class _Outcome:
    exit_code: int = 0


def _note_failure(name: str, run_dir: Path, text: str) -> None:
    """Adds a failure to the log of a stage that had begun; a disk that is full may refuse."""
    log = run_dir / name / "log.txt"
    if log.parent.exists():
        with suppress(OSError), log.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} failed\n{text}\n")


@contextmanager
def _explained_failures(name: str, arguments: argparse.Namespace) -> Iterator[_Outcome]:
    """Turns expected failures into four lines and an exit code; the rest keep their traceback."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt(signal.Signals(signum).name)

    outcome = _Outcome()
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield outcome
    except ExpectedError as error:
        failure = error
    except KeyboardInterrupt as error:
        failure = StageError(
            f"{name} was interrupted",
            "the stage to run to its end",
            str(error) or "Ctrl-C",
            "run the same command again: it goes on from the last finished part",
        )
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            _note_failure(name, arguments.run_dir, traceback.format_exc())
            raise
        failure = StageError(
            f"{name} could not write {error.filename or f'to {arguments.run_dir}'}",
            "room on the disk",
            error.strerror or "no space left",
            "free some space, then run the same command again: finished parts are kept",
        )
    except Exception:
        _note_failure(name, arguments.run_dir, traceback.format_exc())
        raise
    else:
        return
    finally:
        signal.signal(signal.SIGTERM, previous)
    print(failure, file=sys.stderr, flush=True)
    _note_failure(name, arguments.run_dir, str(failure))
    if arguments.json:
        told = {key: getattr(failure, key) for key in ("what", "expected", "found", "fix")}
        print(json.dumps({"stage": name, "status": "failed", **told, **failure.details}, indent=1))
    outcome.exit_code = failure.exit_code


__all__ = ["ConfigError", "Stage", "StageError", "run_stage"]
