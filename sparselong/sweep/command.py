"""Plan and execute a sweep.

A run that fails does not stop the others: they do not depend on it, and a learning rate that
diverges should not cost a night. The sweep then ends with exit code 1. An interruption stops it.
The same command continues: finished runs are up to date, the interrupted one resumes, failed ones
are tried again.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparselong.config import Config
from sparselong.errors import ConfigError, ExpectedError, StageError
from sparselong.memory import make_plan
from sparselong.processes import Ended, is_joined, run_script
from sparselong.provenance import gpu_name
from sparselong.run import (
    Stage,
    check_begun,
    check_run_dir,
    complete_commands,
    locked,
    read_manifest,
    writing,
)
from sparselong.sweep import comparison, curves
from sparselong.sweep.plan import Planned, describe, format_plan
from sparselong.sweep.runs import STAGE, Run, make_runs
from sparselong.sweep.sharing import COMPRESS, find_compressed, take_compressed, take_date


def run_sweep(
    arguments: Namespace, check: Callable[[Config], object], scripts: Path
) -> tuple[dict[str, Any], str]:
    """Execute stage 03 for each combination of values, or plan that for `--dry-run`.

    Args:
        arguments: the command line of stage 03. Its `run_dir` becomes the sweep's directory.
        check: raises if stage 03 cannot be executed here with a config.
        scripts: the directory of the numbered scripts.

    Returns:
        The comparison or plan as JSON, and as text.

    Raises:
        ConfigError: the command line cannot be a sweep's.
        StageError: a run failed, or cannot begin because its directory holds other work.
    """
    _refuse_unsupported(arguments)
    base = arguments.run_dir if arguments.run_dir.name else arguments.run_dir.resolve()
    folder = arguments.run_dir = base.with_name(f"{base.name}-sweep")
    runs = make_runs(arguments, folder)
    places = [base, *(run.dir for run in runs)]
    planned = _plan(runs, places, arguments, check)
    document = describe(planned, folder)
    if arguments.dry_run:
        return document, format_plan(document)
    print(format_plan(document), file=sys.stderr, flush=True)
    with locked(folder):
        done = _execute(runs, places, arguments.config, scripts, folder)
    return done, comparison.format_comparison(done)


def _refuse_unsupported(arguments: Namespace) -> None:
    """Raise if a sweep's command line asks for more than a sweep does."""
    one = f"{arguments.run_dir}-sweep/RUN"
    refused = {
        "--force": (arguments.force, f"redo one run: python {STAGE}.py --run-dir {one} --force"),
        "--preview": (arguments.preview is not None, "use --preview without --sweep"),
        "torchrun": (is_joined(), f"use python {STAGE}.py, which starts each run's processes"),
    }
    for name, (is_asked, fix) in refused.items():
        if is_asked:
            expected = "a sweep's own command line"
            raise ConfigError(f"--sweep does not work with {name}", expected, name, fix)


def _plan(
    runs: Sequence[Run],
    places: Sequence[Path],
    arguments: Namespace,
    check: Callable[[Config], object],
) -> list[Planned]:
    """Check every run before the first one begins, and plan it."""
    gpu = None if arguments.dry_run else gpu_name()
    planned: list[Planned] = []
    for run in runs:
        try:
            with writing(run.dir):
                check_run_dir(run.config, run.dir, arguments.config)
            if not arguments.dry_run:
                check(run.config)
            state = check_begun(Stage(STAGE, run.config, run.dir))
            origin = find_compressed(run.config, run.dir, places)
        except ExpectedError as error:
            raise error.with_fix(
                complete_commands(error.fix, _words(run, arguments.config))
            ) from None
        made = make_plan(run.config, gpu_name=gpu)
        planned.append(Planned(run, state, origin, made))
    return planned


def _words(run: Run, config_file: str) -> list[str]:
    """Return the command line of a run's scripts."""
    return ["--config", config_file, "--run-dir", str(run.dir), *run.words]


def _execute(
    runs: Sequence[Run], places: Sequence[Path], config_file: str, scripts: Path, folder: Path
) -> dict[str, Any]:
    """Execute the runs one after another; return their comparison.

    Raises:
        StageError: at least one failed; carries the comparison.
    """
    failures: dict[str, dict[str, str]] = {}
    document: dict[str, Any] = {}
    for number, run in enumerate(runs, start=1):
        print(f"run {number} of {len(runs)}: {run.name}", file=sys.stderr, flush=True)
        failure = _execute_run(run, places, _words(run, config_file), scripts)
        if failure is not None:
            failures[run.name] = failure
        document = comparison.compare(runs, failures)
        comparison.write(document, folder)
    done = [run for run in runs if run.name not in failures]
    if done:
        curves.draw({run.name: _curve(run) for run in done}, folder / curves.PLOT)
    if failures:
        print(comparison.format_comparison(document), file=sys.stderr, flush=True)
        raise StageError(
            f"{len(failures)} of {len(runs)} runs of the sweep failed",
            "every run to finish",
            "; ".join(f"{name}: {failure['what']}" for name, failure in failures.items()),
            "see above and the log.txt of these runs; the same command tries them again, and "
            "leaves the finished ones as they are",
            {"sweep": document},
        )
    return document


def _execute_run(
    run: Run, places: Sequence[Path], words: Sequence[str], scripts: Path
) -> dict[str, str] | None:
    """Execute a run's stages 02 and 03; return why it failed, or None."""
    try:
        origin = find_compressed(run.config, run.dir, places)
        if origin is None:
            take_date(places, run.dir)
            failure = _failure_of(COMPRESS, run_script(scripts / f"{COMPRESS}.py", words))
            if failure is not None:
                return failure
        elif origin != run.dir:
            take_compressed(origin, run.dir)
        return _failure_of(STAGE, run_script(scripts / f"{STAGE}.py", words))
    except StageError as error:
        print(error, file=sys.stderr, flush=True)
        return error.explanation()


def _failure_of(stage: str, ended: Ended) -> dict[str, str] | None:
    """Return the four lines of a script that failed; None if it did not."""
    if ended.code == 0:
        return None
    told = ended.document or {}
    code = ended.code
    unexplained = StageError(
        f"{stage} ended with {f'exit code {code}' if code > 0 else f'signal {-code}'}",
        "exit code 0",
        "no explanation",
        "see the traceback above, or the log.txt of the stage",
    ).explanation()
    return {key: str(told.get(key, text)) for key, text in unexplained.items()}


def _curve(run: Run) -> dict[int, float]:
    manifest = read_manifest(run.dir, STAGE)
    assert manifest is not None, "the run is finished"
    return {int(step): value for step, value in manifest["metrics"]["eval_perplexity"].items()}
