"""Run a stage in several processes started by torchrun: rank 0 leads, the others follow.

Rank 0 runs the stage. The other ranks cannot know when the ranks' work (training, or evaluating)
begins, or whether it begins at all (the stage may be up to date, or refuse the config). Rank 0
therefore reports its status through torchrun's rendezvous store: `train`, and finally `ended` with
its exit code.

A process whose trainer fails also writes the failure to the store, because torchrun then ends the
other processes by a signal, which does not tell the cause, and on other machines not at all. What
several machines need beside that is in machines.py.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from typing import TYPE_CHECKING

from sparselong.config import Config, load
from sparselong.errors import ExpectedError, StageError
from sparselong.processes import machines
from sparselong.processes.launch import (
    World,
    find_world,
    is_one_machine,
    joined_rank,
    joined_world,
    local_rank,
)
from sparselong.processes.process import train_ranks
from sparselong.registration import move_caches, set_streams
from sparselong.run import Stage, interruptible, parse_arguments

if TYPE_CHECKING:  # refusing a config needs no torch
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

_PATIENCE = timedelta(days=2)
_TRAIN = "train"


def follow_or_lead(
    name: str,
    argv: list[str] | None,
    run: Callable[[list[str] | None], int],
    trainer: Callable[[Stage], Sequence[str]],
    check: Callable[[Config], object],
) -> int:
    """Run this process's part of a stage that torchrun started in several processes.

    Args:
        name: name of the stage.
        argv: the command line, the same in all processes.
        run: runs the stage; called on rank 0.
        trainer: returns the Python arguments that run a rank; called on the other ranks.
        check: raises if the processes do not fit the config; called on each of several machines.

    Returns:
        The exit code.
    """
    try:
        _check_launcher(name)
        if not is_one_machine():
            _meet(name, argv, check)
        return _lead(name, argv, run) if joined_rank() == 0 else _follow(name, argv, trainer)
    except machines.MachinesError as error:
        print(error.show(), file=sys.stderr, flush=True)
        return error.exit_code
    except ExpectedError as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_code


def _meet(name: str, argv: list[str] | None, check: Callable[[Config], object]) -> None:
    """Raise on every machine if they do not fit together, or one refuses the config."""
    arguments = parse_arguments(name, "", argv)
    refused = None
    if local_rank() == 0:
        try:
            check(load(arguments.config, arguments.overrides))
        except ExpectedError as error:
            refused = error
    machines.meet(*_store(name), machines.Place.of_process(refused))


def _lead(name: str, argv: list[str] | None, run: Callable[[list[str] | None], int]) -> int:
    code = 1
    try:
        code = run(argv)
    finally:
        _set_status(name, f"ended {code}")
        store, key = _store(name)
        store.set(f"{key}/ended", str(code))
    return code


def train_together(stage: Stage, arguments: Sequence[str], world: World | None = None) -> None:
    """Run `train_ranks`, coordinated with the other processes if torchrun started several.

    Args:
        stage: the running stage.
        arguments: the Python arguments that run a rank.
        world: the processes that work together; None: those of `find_world`.

    Raises:
        StageError: a rank failed here, or elsewhere, which the message names.
    """
    rank, world = joined_rank(), world or find_world(stage.config)
    if rank is None:
        train_ranks(stage, arguments, world)
        return
    store, key = _store(stage.name)
    if rank == 0:
        if not is_one_machine():
            machines.mark_directory(stage.dir, store, key)
        _set_status(stage.name, _TRAIN)
    try:
        with interruptible(), ExitStack() as stack:
            if not is_one_machine():
                own, _ = _store(stage.name)
                stack.enter_context(machines.stopped_with_others(own, f"{key}/failure"))
                machines.find_directory(stage.dir, store, key)
                machines.gather(store, f"{key}/ready")
            train_ranks(stage, arguments, world)
    except ExpectedError as error:
        store.compare_set(f"{key}/failure", "", json.dumps([error.what, error.found, error.fix]))
        raise
    except KeyboardInterrupt:
        if not store.check([f"{key}/failure"]):
            raise
        what, found, fix = json.loads(store.get(f"{key}/failure"))
        raise StageError(
            f"rank {rank} was stopped because another rank failed",
            "every rank to run to the end",
            f"{what}: {found}",
            fix,
            consequence=True,
        ) from None


def _follow(name: str, argv: list[str] | None, trainer: Callable[[Stage], Sequence[str]]) -> int:
    set_streams()
    arguments = parse_arguments(name, "", argv)
    store, key = _store(name)
    store.wait([key], _PATIENCE)
    status, _, code = store.get(key).decode().partition(" ")
    if status == _TRAIN:
        stage = Stage(name, load(arguments.config, arguments.overrides), arguments.run_dir)
        move_caches(stage.run_dir / "cache", [stage.config.model.base])
        try:
            train_together(stage, trainer(stage), joined_world(stage.config))
        except KeyboardInterrupt as signalled:
            print(f"rank {joined_rank()} was interrupted: {signalled}", file=sys.stderr, flush=True)
            return 1
        if is_one_machine():
            return 0
        code = _await_end(store, key)
    if code != "0":
        print(f"rank {joined_rank()}: rank 0 failed, see its message", file=sys.stderr)
    return int(code)


def _await_end(store: TCPStore, key: str) -> str:
    """Return rank 0's exit code; this machine may hold the store, which rank 0 needs until then."""
    from torch.distributed import DistError  # pyright: ignore[reportPrivateImportUsage]

    try:
        store.wait([f"{key}/ended"], _PATIENCE)
        return store.get(f"{key}/ended").decode()
    except DistError:  # rank 0's machine held it, and torchrun has ended there
        return "1"


def _set_status(name: str, status: str) -> None:
    """Set the shared status; a final status is never overwritten."""
    store, key = _store(name)
    if status == _TRAIN or not store.check([key]):
        store.set(key, status)


def _check_launcher(name: str) -> None:
    """Raise if the launcher of several processes gives them no rendezvous store."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise StageError(
            f"several processes were started, but not by torchrun (this is rank {joined_rank()})",
            f"torchrun or accelerate launch, or plain python {name}.py on one machine",
            "WORLD_SIZE without torchrun's other variables",
            f"torchrun --nproc_per_node=N {name}.py ...",
        )


def _store(name: str) -> tuple[TCPStore, str]:
    """Return torchrun's rendezvous store, and the key of the stage's status in it."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return TCPStore(host, port, is_master=False), f"sparselong/{name}/{attempt}"
