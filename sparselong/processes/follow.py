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

import argparse
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
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
from sparselong.registration import begin_program, move_caches
from sparselong.run import Stage, interruptible, parse_arguments

if TYPE_CHECKING:  # refusing a config needs no torch
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

_PATIENCE = timedelta(days=2)
_TRAIN = "train"
_POLL_SECONDS = 0.5


def follow_or_lead(
    name: str,
    argv: list[str] | None,
    run: Callable[[list[str] | None], int],
    trainer: Callable[[Stage], Sequence[str]],
    check: Callable[[Config], object],
    add_options: Callable[[argparse.ArgumentParser], None] | None = None,
) -> int:
    """Run this process's part of a stage that torchrun started in several processes.

    Args:
        name: name of the stage.
        argv: the command line, the same in all processes.
        run: runs the stage; called on rank 0.
        trainer: returns the Python arguments that run a rank; called on the other ranks.
        check: raises if the processes do not fit the config; called on each of several machines.
        add_options: adds the script's own options, as for `parse_arguments`.

    Returns:
        The exit code.
    """
    begin_program()
    try:
        _check_launcher(name)
        if not is_one_machine():
            _meet(parse_arguments(name, "", argv, add_options), name, check)
        if joined_rank() == 0:
            return _lead(name, argv, run)
        return _follow(parse_arguments(name, "", argv, add_options), name, trainer)
    except machines.MachinesError as error:
        print(error.show(), file=sys.stderr, flush=True)
        return error.exit_code
    except ExpectedError as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_code


def _meet(arguments: argparse.Namespace, name: str, check: Callable[[Config], object]) -> None:
    """Raise on every machine if they do not fit together, or one refuses the config."""
    refused = None
    if local_rank() == 0:
        try:
            check(load(arguments.config, arguments.overrides))
        except ExpectedError as error:
            refused = error
    machines.meet(*_store(name), machines.Place.of_process(refused))


def _lead(name: str, argv: list[str] | None, run: Callable[[list[str] | None], int]) -> int:
    code, place = 1, _rendezvous(name)  # a run that joins the others hides the launcher
    try:
        code = run(argv)
    finally:
        store, key = _store(name, place)
        if not store.check([key]):
            store.set(key, f"ended {code}")  # a final status is never overwritten
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
        store.set(key, _TRAIN)
    with _failing_together(rank, store, key), interruptible(), ExitStack() as stack:
        if not is_one_machine():
            own, _ = _store(stage.name)
            stack.enter_context(machines.stopped_with_others(own, f"{key}/failure"))
            machines.find_directory(stage.dir, store, key)
            machines.gather(store, f"{key}/ready")
        train_ranks(stage, arguments, world)


@contextmanager
def leading_together(stage: Stage) -> Iterator[None]:
    """Let the processes that torchrun started begin their ranks; this process is rank 0 itself.

    Raises:
        StageError: a rank failed, which the message names.
    """
    store, key = _store(stage.name)
    own, ended = _store(stage.name)[0], threading.Event()
    listener = threading.Thread(target=_report_failure, args=(own, key, ended), daemon=True)
    listener.start()
    store.set(key, _TRAIN)
    try:
        with _failing_together(0, store, key):
            yield
    finally:
        ended.set()
        listener.join()


def _report_failure(store: TCPStore, key: str, ended: threading.Event) -> None:
    """Report another process's failure to this one's exchanges, which may wait for its rank."""
    from torch.distributed import DistError  # pyright: ignore[reportPrivateImportUsage]

    from sparselong.processes.watch import report_end

    with suppress(DistError):  # the launcher has ended
        while not ended.wait(_POLL_SECONDS):
            if store.check([f"{key}/failure"]):
                report_end(json.loads(store.get(f"{key}/failure"))[-1])
                return


@contextmanager
def _failing_together(rank: int, store: TCPStore, key: str) -> Iterator[None]:
    """Tell the others of the block's failure; name theirs if a signal ends the block for it."""
    try:
        yield
    except ExpectedError as error:
        store.compare_set(
            f"{key}/failure", "", json.dumps([error.what, error.found, error.fix, rank])
        )
        raise
    except KeyboardInterrupt:
        if not store.check([f"{key}/failure"]):
            raise
        what, found, fix, _ = json.loads(store.get(f"{key}/failure"))
        raise StageError(
            f"rank {rank} was stopped because another rank failed",
            "every rank to run to the end",
            f"{what}: {found}",
            fix,
            consequence=True,
        ) from None


def _follow(
    arguments: argparse.Namespace, name: str, trainer: Callable[[Stage], Sequence[str]]
) -> int:
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


def _check_launcher(name: str) -> None:
    """Raise if the launcher of several processes gives them no rendezvous store."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise StageError(
            f"several processes were started, but not by torchrun (this is rank {joined_rank()})",
            f"torchrun or accelerate launch, or plain python {name}.py on one machine",
            "WORLD_SIZE without torchrun's other variables",
            f"torchrun --nproc_per_node=N {name}.py ...",
        )


def _rendezvous(name: str) -> tuple[str, int, str]:
    """Return host and port of torchrun's store, and the key of the stage's status in it."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return host, port, f"sparselong/{name}/{attempt}"


def _store(name: str, place: tuple[str, int, str] | None = None) -> tuple[TCPStore, str]:
    """Return torchrun's rendezvous store, and the key of the stage's status in it."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    host, port, key = place or _rendezvous(name)
    return TCPStore(host, port, is_master=False), key
