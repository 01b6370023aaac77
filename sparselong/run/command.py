"""The command line of every numbered script: one function around a stage.

Expected errors are raised before anything heavy is imported: `execute` is called only after the
config has been read, the run directory locked and the stage's inputs found.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparselong.config import Config, load
from sparselong.errors import ExpectedError, StageError
from sparselong.files import is_disk_full
from sparselong.run.directory import Stage, finish, locked, prepare, read_manifest

DEFAULT_CONFIG = "configs/gpt-oss-120b-4x3090.yaml"


def parse_arguments(name: str, description: str, argv: list[str] | None) -> argparse.Namespace:
    """Return the parsed command line, which is the same for every script but for --preview."""
    parser = argparse.ArgumentParser(prog=f"{name}.py", description=description)
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="YAML file (default %(default)s)")
    parser.add_argument("--run-dir", type=Path, help="default runs/<name of the config file>")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="config overrides")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, touch nothing")
    parser.add_argument("--force", action="store_true", help="redo a finished stage")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    if name == "03_finetune":
        text = "print a conversation with its supervised tokens marked, touch nothing"
        parser.add_argument("--preview", metavar="FILE:LINE", help=text)
    parser.set_defaults(preview=None)
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
    check: Callable[[Config], object] | None = None,
    keep_result: bool = True,
    preview: Callable[[Config, Path, str], dict[str, Any]] | None = None,
) -> int:
    """Run one stage as a command line program.

    Args:
        name: the stage's name in `STAGES`.
        description: text for `--help`.
        argv: command line arguments; None takes the process's.
        execute: does the work and fills the stage's metrics, inputs and outputs.
        plan: (config, run directory, stage name) → document for `--dry-run`; changes nothing.
        show_plan: formats the plan for display.
        check: raises, before anything is changed, if the config cannot be executed here.
        keep_result: whether a finished stage is up to date; false repeats it on every call.
        preview: (config, run directory, `FILE:LINE`) → document with `text` for `--preview`;
            changes nothing.

    Returns:
        0 if the stage is done, 1 if it failed, 2 for a usage or config error.
    """
    arguments = parse_arguments(name, description, argv)
    redo = arguments.force or not keep_result
    with _explained_failures(name, arguments) as outcome:
        config = load(arguments.config, arguments.overrides)
        if arguments.dry_run:
            document = plan(config, arguments.run_dir, name)
            text = show_plan(document)
        elif preview is not None and arguments.preview is not None:
            document = preview(config, arguments.run_dir, arguments.preview)
            text = document["text"]
        else:
            if check is not None:
                check(config)
            document = _run_locked(Stage(name, config, arguments.run_dir), redo, execute)
            text = show_manifest(document)
        print(json.dumps(document, indent=1) if arguments.json else text, flush=True)
    return outcome.exit_code


def _run_locked(stage: Stage, redo: bool, execute: Callable[[Stage], None]) -> dict[str, Any]:
    with locked(stage.run_dir):
        if prepare(stage, redo):
            stage.log(f"{stage.name} is up to date in {stage.run_dir} for this config")
            return read_manifest(stage.run_dir, stage.name) or {}
        start = time.monotonic()
        execute(stage)
        return finish(stage, time.monotonic() - start)


def show_manifest(manifest: dict[str, Any]) -> str:
    """Return a summary of a finished stage: its duration and scalar metrics."""
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
    """Append a failure to the stage's log if the stage has started; ignore a full disk."""
    log = run_dir / name / "log.txt"
    with suppress(OSError):
        if log.parent.exists():
            with log.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} failed\n{text}\n")


@contextmanager
def _explained_failures(name: str, arguments: argparse.Namespace) -> Iterator[_Outcome]:
    """Turn expected failures into four lines and an exit code; others keep their traceback."""

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
            "the stage to finish",
            str(error) or "Ctrl-C",
            "run the same command again: it continues from the last finished part",
        )
    except Exception as error:
        if not is_disk_full(error):
            _note_failure(name, arguments.run_dir, traceback.format_exc())
            raise
        file = getattr(error, "filename", None)
        failure = StageError(
            f"{name} could not write {file or f'to {arguments.run_dir}'}",
            "free disk space",
            getattr(error, "strerror", None) or str(error).splitlines()[0],
            "free some space, then run the same command again: finished parts are kept",
        )
    else:
        return
    finally:
        signal.signal(signal.SIGTERM, previous)
    print(failure, file=sys.stderr, flush=True)
    if arguments.preview is None:
        _note_failure(name, arguments.run_dir, str(failure))
    if arguments.json:
        document = {"stage": name, "status": "failed", **failure.explanation(), **failure.details}
        print(json.dumps(document, indent=1))
    outcome.exit_code = failure.exit_code
