"""The command line of a stage with several results, each in a directory with its own manifest.

The command line says which of them to make. One after another is checked, made, and recorded as
done; each can be up to date, be resumed and be redone for itself. All are checked before the first
one begins.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from sparselong.config import Config, load
from sparselong.errors import ExpectedError
from sparselong.registration import begin_program
from sparselong.run.command import (
    Outcome,
    explained_failures,
    parse_arguments,
    prepare_caches,
    report,
    run_locked,
)
from sparselong.run.directory import Stage, check_finished
from sparselong.run.interruption import Interruption, interruptible
from sparselong.run.lock import locked, writing
from sparselong.run.manifests import show_manifest
from sparselong.run.place import check_run_dir
from sparselong.run.publishing import Publish, publish


class Part(NamedTuple):
    """A result that the command line asks for.

    Attributes:
        name: of its directory in the stage's.
        reads: the earlier stages that it reads.
        options: options of the command line that decide it, by name.
        is_renewed: whether what it made before is replaced without `--force`.
        takes_force: whether `--force` is about it.
    """

    name: str
    reads: tuple[str, ...]
    options: dict[str, str]
    is_renewed: bool = False
    takes_force: bool = True


@dataclass(frozen=True)
class Choice:
    """How the command line says which parts to make.

    Attributes:
        add_options: adds the options that say so.
        parts: returns the parts that a command line asks for; raises ConfigError. It may move
            arguments that one of its options has taken to `overrides`.
    """

    add_options: Callable[[argparse.ArgumentParser], None]
    parts: Callable[[argparse.Namespace], list[Part]]


def run_parts(
    name: str,
    description: str,
    argv: list[str] | None,
    execute: Callable[[Stage], None],
    plan: Callable[[list[Stage]], dict[str, Any]],
    show_plan: Callable[[dict[str, Any]], str],
    choice: Choice,
    check: Callable[[list[Stage]], object],
    page: Publish | None = None,
) -> int:
    """Run the parts of a stage that the command line asks for.

    Args:
        name: see `run_stage`.
        description: see `run_stage`.
        argv: see `run_stage`.
        execute: makes one part and fills its metrics, inputs and outputs.
        plan: parts → document for `--dry-run`; changes nothing.
        show_plan: formats the plan for display.
        choice: how the command line says which parts to make.
        check: raises, before anything is changed, if a part cannot be made with the config.
        page: see `run_stage`; written once each part is done.

    Returns:
        0 if all parts are done, 1 if one failed, 2 for a usage or config error.
    """
    begin_program()
    try:
        arguments = parse_arguments(name, description, argv, choice.add_options)
    except ExpectedError as error:  # also of a stream, from --help
        report(name, error, as_json="--json" in (sys.argv if argv is None else argv))
        return error.exit_code
    with explained_failures(name, arguments) as outcome, interruptible() as interruption:
        stages = _open(name, arguments, choice)
        check(stages)
        if arguments.dry_run:
            for stage in (one for one in stages if not one.forced and not one.is_renewed):
                check_finished(stage)
            document = plan(stages)
            text = show_plan(document)
        else:
            manifests = _make(stages, execute, outcome, interruption, page)
            document = {"stage": name, "status": "done", "parts": manifests}
            text = "\n".join(show_manifest(manifests[one.part], one.done_at) for one in stages)
        print(json.dumps(document, indent=1) if arguments.json else text, flush=True)
    return outcome.exit_code


def _open(name: str, arguments: argparse.Namespace, choice: Choice) -> list[Stage]:
    """Return the parts as stages, with the config loaded and the run directory checked."""
    parts = choice.parts(arguments)
    config: Config = load(arguments.config, arguments.overrides)
    with writing(arguments.run_dir):
        check_run_dir(config, arguments.run_dir, arguments.config)
    return [
        Stage(
            name,
            config,
            arguments.run_dir,
            forced=arguments.force and part.takes_force,
            is_renewed=part.is_renewed,
            part=part.name,
            options=part.options,
            reads=part.reads,
        )
        for part in parts
    ]


def _make(
    stages: list[Stage],
    execute: Callable[[Stage], None],
    outcome: Outcome,
    interruption: Interruption,
    page: Publish | None,
) -> dict[str, dict[str, Any]]:
    """Make one part after another, and return their manifests by name."""
    cache, manifests = prepare_caches(stages[0]), {}
    with locked(stages[0].run_dir):
        for stage in stages:
            outcome.part = stage.part
            redo = stage.forced or stage.is_renewed
            manifests[stage.part] = run_locked(stage, redo, execute, cache, interruption)
            publish(stage, page)
    return manifests
