"""The command line of a script that uses results and makes none: no manifest, nothing to redo."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from sparselong.config import load
from sparselong.errors import ExpectedError
from sparselong.registration import begin_program
from sparselong.run.command import explained_failures, parse_arguments, prepare_caches, report
from sparselong.run.directory import Stage, read_inputs
from sparselong.run.interruption import interruptible
from sparselong.run.lock import writing
from sparselong.run.log import LOG
from sparselong.run.place import check_run_dir

Document = dict[str, Any]


def run_session(
    name: str,
    description: str,
    argv: list[str] | None,
    execute: Callable[[Stage, argparse.Namespace], Document],
    plan: Callable[[Stage, argparse.Namespace], Document],
    show: Callable[[Document], str],
    add_options: Callable[[argparse.ArgumentParser], None],
    check: Callable[[argparse.Namespace], tuple[str, ...]],
) -> int:
    """Run a script that opens what earlier stages made.

    Args:
        name: see `run_stage`.
        description: see `run_stage`.
        argv: see `run_stage`.
        execute: does the work and returns the document for `--json`.
        plan: returns the document for `--dry-run`; changes nothing.
        show: formats either document for display; an empty text is not shown.
        add_options: adds options of this script alone.
        check: raises unless the options can be used; returns the stages whose results they need.

    Returns:
        0 if all went well, 1 if it failed, 2 for a usage or config error.
    """
    begin_program()
    try:
        arguments = parse_arguments(name, description, argv, add_options)
    except ExpectedError as error:  # also of a stream, from --help
        report(name, error, as_json="--json" in (sys.argv if argv is None else argv))
        return error.exit_code
    with explained_failures(name, arguments) as outcome, interruptible():
        reads = check(arguments)
        config = load(arguments.config, arguments.overrides)
        with writing(arguments.run_dir):
            check_run_dir(config, arguments.run_dir, arguments.config)
        stage = Stage(name, config, arguments.run_dir, reads=reads)
        if arguments.dry_run:
            document = plan(stage, arguments)
        else:
            read_inputs(stage)
            prepare_caches(stage)
            with writing(stage.dir):
                stage.dir.mkdir(parents=True, exist_ok=True)
                (stage.dir / LOG).open("a", encoding="utf-8").close()
            document = execute(stage, arguments)
        text = json.dumps(document, indent=1) if arguments.json else show(document)
        if text:
            print(text, flush=True)
    return outcome.exit_code
