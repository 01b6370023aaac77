"""The command line of every numbered script: one function around a stage.

Expected errors are raised before anything heavy is imported: `execute` is called only after the
config has been read, the run directory locked and the stage's inputs found.
"""

from __future__ import annotations

import argparse
import errno
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from sparselong.config import Config, load, refuse_repeated, split_overrides
from sparselong.errors import ConfigError, ExpectedError, StageError
from sparselong.files import is_disk_full
from sparselong.registration import OutputError, begin_program, choose_gpu, move_caches
from sparselong.run.directory import Stage, check_finished, finish, prepare
from sparselong.run.interruption import Interruption, interruptible
from sparselong.run.latest import name_model
from sparselong.run.lock import locked, writing
from sparselong.run.log import LOG, add_to_log
from sparselong.run.manifests import MissingStage, show_manifest
from sparselong.run.place import MANIFEST, STARTED, check_run_dir, find_run_dir, read_document
from sparselong.run.publishing import Publish, publish
from sparselong.run.stages import (
    STAGES,
    add_own_options,
    check_installed,
    complete_commands,
    describe_done,
    parse_layers,
)

_KEPT = {
    "02_compress": ": finished layers are kept",
    "03_finetune": ": training continues from its last whole checkpoint, if there is one",
    "04_eval": ": models that were measured are not measured again",
    "05_export": ": files that are complete are kept",
}
"""What a stage that was interrupted need not repeat."""
DEFAULT_CONFIG = str(Path(__file__).resolve().parents[2] / "configs/gpt-oss-120b-4x3090.yaml")
_REFUSALS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ESTALE),
)
"""Errors of files that people cause by names and permissions, and that file systems cause."""


class _Parser(argparse.ArgumentParser):
    """Parser whose errors are explained as those of the config are."""

    def error(self, message: str) -> NoReturn:
        known, (start, _, unknown) = self._option_string_actions, message.partition(": ")
        near = [
            close
            for word in (unknown.split() if start == "unrecognized arguments" else ())
            for close in get_close_matches(word.partition("=")[0], known, 1)
        ]
        raise ConfigError(
            "the command line cannot be read",
            " ".join(self.format_usage().split()),
            message,
            f"did you mean {near[0]}?" if near else f"see python {self.prog} --help",
        )


def parse_arguments(
    name: str,
    description: str,
    argv: list[str] | None,
    add_options: Callable[[argparse.ArgumentParser], None] | None = None,
) -> argparse.Namespace:
    """Return the parsed command line, which is the same for every script but for a few options.

    Args:
        name: the stage's name in `STAGES`.
        description: text for `--help`.
        argv: command line arguments; None takes the process's.
        add_options: adds options of this script alone.

    Raises:
        ConfigError: it cannot be read, --run-dir cannot be a directory, or there is no such GPU.
        StageError: packages that the script needs are missing; a plan needs none of them.
    """
    parser = _Parser(prog=f"{name}.py", description=description)
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="YAML file (default %(default)s)")
    parser.add_argument("--run-dir", help="default runs/<name of the config file>")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="config overrides")
    parser.add_argument("--gpu", type=int, metavar="N", help="use this GPU alone, as in nvidia-smi")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, touch nothing")
    parser.add_argument("--force", action="store_true", help="redo a finished stage")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    add_own_options(parser, name)
    if add_options is not None:
        add_options(parser)
    parser.set_defaults(preview=None, sweep=None, layers=None)
    arguments = parser.parse_intermixed_args(argv)
    arguments.layers = parse_layers(arguments.layers, arguments.force)
    if STAGES[name].extended_by and arguments.compare:
        named, overrides = split_overrides(arguments.compare)  # it takes all words that follow
        if not named:
            parser.error("argument --compare: expected at least one argument")
        overrides.append(f"{STAGES[name].extended_by}={json.dumps(named)}")
        arguments.overrides += overrides
    refuse_repeated(arguments.overrides)
    if arguments.gpu is not None:
        choose_gpu(arguments.gpu)
    if not arguments.dry_run:
        check_installed(name)
    arguments.repeated = _repeated(arguments)
    arguments.run_dir = find_run_dir(arguments.run_dir, arguments.config)
    return arguments


def _repeated(arguments: argparse.Namespace) -> list[str]:
    """Return the words of a command line that every command for the same run must repeat."""
    words = [] if arguments.config == DEFAULT_CONFIG else ["--config", arguments.config]
    words += [] if arguments.run_dir is None else ["--run-dir", str(arguments.run_dir)]
    return words + list({item.partition("=")[0]: item for item in arguments.overrides}.values())


class Others(NamedTuple):
    """What a command line may ask for in place of the stage.

    Attributes:
        preview: (config, run directory, option) → document with `text`; changes nothing.
        sweep: (command line) → document and its text; runs the stage for each combination of
            values.
    """

    preview: Callable[[Config, Path, str], dict[str, Any]]
    sweep: Callable[[argparse.Namespace], tuple[dict[str, Any], str]]


def run_stage(
    name: str,
    description: str,
    argv: list[str] | None,
    execute: Callable[[Stage], None],
    plan: Callable[[Config, Path, str], dict[str, Any]],
    show_plan: Callable[[dict[str, Any]], str],
    check: Callable[[Config], object] | None = None,
    others: Others | None = None,
    page: Publish | None = None,
) -> int:
    """Run one stage as a command line program.

    Args:
        name: the stage's name in `STAGES`.
        description: text for `--help`.
        argv: command line arguments; None takes the process's.
        execute: does the work and fills the stage's metrics, inputs and outputs.
        plan: (config, run directory, stage name) → document for `--dry-run`; changes nothing.
        show_plan: formats the plan for display.
        check: raises, before anything is changed, if the config cannot run; see `prepare_caches`.
        others: what its command line may ask for in place of the stage.
        page: writes the page about the run once the stage is done.

    Returns:
        0 if the stage is done, 1 if it failed, 2 for a usage or config error.
    """
    begin_program()
    try:
        arguments = parse_arguments(name, description, argv)
    except ExpectedError as error:  # also of a stream, from --help
        report(name, error, as_json="--json" in (sys.argv if argv is None else argv))
        return error.exit_code
    with explained_failures(name, arguments) as outcome, interruptible() as interruption:
        if others is not None and arguments.sweep is not None:
            document, text = others.sweep(arguments)
        else:
            stage = _open(name, arguments)
            redo = stage.forced or STAGES[name].repeats
            if arguments.dry_run:
                document = _plan(stage, redo, plan)
                text = show_plan(document)
            elif others is not None and arguments.preview is not None:
                document = others.preview(stage.config, stage.run_dir, arguments.preview)
                text = document["text"]
            else:
                document = _run(stage, redo, execute, check, interruption, page)
                text = show_manifest(document, stage.done_at)
        print(json.dumps(document, indent=1) if arguments.json else text, flush=True)
    return outcome.exit_code


def _open(name: str, arguments: argparse.Namespace) -> Stage:
    """Return the stage of a command line, with the config loaded and the run directory checked."""
    config = load(arguments.config, arguments.overrides)
    with writing(arguments.run_dir):
        check_run_dir(config, arguments.run_dir, arguments.config)
    forced, layers = arguments.force, arguments.layers
    return Stage(name, config, arguments.run_dir, forced=forced, layers=layers)


def _plan(
    stage: Stage, redo: bool, plan: Callable[[Config, Path, str], dict[str, Any]]
) -> dict[str, Any]:
    """Return the plan of a stage; raise if it is done, but from inputs that have changed."""
    if not redo:
        check_finished(stage)
    return plan(stage.config, stage.run_dir, stage.name)


def _run(
    stage: Stage,
    redo: bool,
    execute: Callable[[Stage], None],
    check: Callable[[Config], object] | None,
    interruption: Interruption,
    page: Publish | None,
) -> dict[str, Any]:
    """Check and execute a stage, write the page about the run, and return the stage's manifest."""
    cache = prepare_caches(stage, check)
    with locked(stage.run_dir):
        manifest = run_locked(stage, redo, execute, cache, interruption)
        if not stage.unfinished:
            publish(stage, page)
    return manifest


def prepare_caches(stage: Stage, check: Callable[[Config], object] | None = None) -> Path | None:
    """Check the config, and return where caches go if it is not where they usually are.

    If `check` returns a dictionary, that is a fingerprint of what `extended_by` names, by name.
    """
    cache, config = stage.run_dir / "cache", stage.config
    moved = move_caches(cache, (config.model.base, *config.data.named.values()))
    found = check(config) if check is not None else None
    if isinstance(found, dict):
        stage.named = found
    return cache if moved else None


def run_locked(
    stage: Stage,
    redo: bool,
    execute: Callable[[Stage], None],
    cache: Path | None,
    interruption: Interruption,
) -> dict[str, Any]:
    """Execute a stage or part unless it is up to date, and return its manifest.

    Args:
        stage: the stage, whose run directory is locked.
        redo: whether to redo a finished one.
        execute: does the work.
        cache: result of `prepare_caches`.
        interruption: raises if a signal came.
    """
    if prepare(stage, redo):
        manifest = read_document(stage.dir / MANIFEST) or {}
        stage.done_at = (stage.dir / MANIFEST).stat().st_mtime
        stage.log(describe_done(stage.config, manifest, stage.run_dir))
        return manifest
    start = time.monotonic()
    if cache is not None:
        with writing(cache):
            cache.mkdir(exist_ok=True)
        stage.log(f"caches go to {cache}: the home directory or a cache cannot be written")
    with stage.display:
        execute(stage)
    interruption.check()  # before the manifest says that the stage is done
    seconds = time.monotonic() - start
    if stage.unfinished:
        told = {"stage": stage.name, "status": "unfinished", "seconds": seconds}
        return told | {"metrics": stage.unfinished}
    manifest = finish(stage, seconds)
    name_model(stage)
    return manifest


@dataclass
class Outcome:
    """What became of a script.

    Attributes:
        exit_code: the script's.
        part: name of the part that is executed, if the stage has parts.
    """

    exit_code: int = 0
    part: str = ""


def _note_failure(folder: Path, text: str) -> None:
    """Append a failure to the stage's log if the stage has started; ignore a full disk."""
    log = folder / LOG
    with suppress(OSError):
        if (log.parent / STARTED).exists():
            add_to_log(log, f"failed\n{text}")


def _rerun(name: str, folder: Path, arguments: argparse.Namespace) -> str:
    """Return which command continues the stage and what it need not repeat."""
    again = "the same command again"
    if arguments.dry_run or name not in _KEPT:
        return again
    if not arguments.force:
        return f"{again}{_KEPT[name]}"
    if (folder / MANIFEST).exists():
        return again  # the old result is still in place: nothing has begun
    return f"{again} without --force{_KEPT[name]}"


@contextmanager
def explained_failures(name: str, arguments: argparse.Namespace) -> Iterator[Outcome]:
    """Turn expected failures into four lines and an exit code; others keep their traceback."""
    outcome = Outcome()
    try:
        yield outcome
    except ExpectedError as error:
        failure = error
    except KeyboardInterrupt as error:
        if error.__cause__ is not None:  # what became of the signal, in case it is a fault
            _note_failure(_folder(name, outcome, arguments), traceback.format_exc())
        failure = StageError(
            f"{name} was interrupted",
            "the stage to finish",
            str(error) or "Ctrl-C",
            f"run {_rerun(name, _folder(name, outcome, arguments), arguments)}",
        )
    except Exception as error:
        folder = _folder(name, outcome, arguments)
        found = _explain_system(error, name, folder, arguments)
        if found is None or not is_disk_full(error):
            _note_failure(folder, traceback.format_exc())
        if found is None:
            raise
        failure = found
    else:
        return
    failure = failure.with_fix(complete_commands(failure.fix, arguments.repeated))
    if isinstance(failure, MissingStage) and arguments.config == DEFAULT_CONFIG:
        another = "pass --config and --run-dir of the run, as for its other stages"
        failure = failure.with_fix(f"{another}; for {Path(DEFAULT_CONFIG).name}, {failure.fix}")
    report(name, failure, arguments.json)
    if arguments.preview is None:
        _note_failure(_folder(name, outcome, arguments), str(failure))
    outcome.exit_code = failure.exit_code


def _folder(name: str, outcome: Outcome, arguments: argparse.Namespace) -> Path:
    return arguments.run_dir / name / outcome.part


def _explain_system(
    error: Exception, name: str, folder: Path, arguments: argparse.Namespace
) -> StageError | None:
    """Return a full disk, or a file that the system refuses, as an expected failure."""
    file = getattr(error, "filename", None)
    reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
    if is_disk_full(error):
        return StageError(
            f"{name} could not write {file or f'to {arguments.run_dir}'}",
            "free disk space",
            reason,
            f"free some space, then run {_rerun(name, folder, arguments)}",
        )
    if isinstance(error, OSError) and file and error.errno in _REFUSALS:
        return StageError(
            f"{name} could not use {file}",
            "a file or folder, as the stage needs it, that this user can read and write",
            reason,
            f"correct it or its permissions, then run {_rerun(name, folder, arguments)}",
        )
    return None


def report(name: str, failure: ExpectedError, as_json: bool) -> None:
    """Print a failure: four lines to stderr, and a JSON document to stdout on request.

    Where one of the two cannot be written, the exit code and the other one still tell.
    """
    with suppress(OutputError):
        print(failure, file=sys.stderr, flush=True)
    if as_json:
        document = {"stage": name, "status": "failed", **failure.explanation(), **failure.details}
        with suppress(OutputError):
            print(json.dumps(document, indent=1), flush=True)
