"""What the other processes do that torchrun has started with the stage's own, rank 0.

Rank 0 runs the stage. The others know neither when training begins nor whether it begins at all
(the stage may be done already, or refuse the config), so it tells them through the store by which
torchrun's processes meet: `train`, and at its end `ended` with its exit code.

A process whose trainer fails tells the others there, too: torchrun then ends them by a signal,
which says nothing about the cause.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from sparselong.config import load
from sparselong.errors import ExpectedError, StageError
from sparselong.processes.launch import joined_rank
from sparselong.processes.process import train_ranks
from sparselong.run import Stage, parse_arguments

if TYPE_CHECKING:  # a refusal needs no torch
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

_PATIENCE = timedelta(days=2)
_TRAIN = "train"


def follow_or_lead(
    name: str,
    argv: list[str] | None,
    run: Callable[[list[str] | None], int],
    trainer: Callable[[Stage], Sequence[str]],
) -> int:
    """Do this process's part of a stage that torchrun has started in several.

    Args:
        name: the stage's.
        argv: the command line, the same in all of them.
        run: the stage itself, for rank 0.
        trainer: gives the arguments of Python that train a rank, for the others.

    Returns:
        The exit code.
    """
    try:
        _check_launcher(name)
        return _lead(name, argv, run) if joined_rank() == 0 else _follow(name, argv, trainer)
    except ExpectedError as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_code


def _lead(name: str, argv: list[str] | None, run: Callable[[list[str] | None], int]) -> int:
    code = 1
    try:
        code = run(argv)
    finally:
        _tell(name, f"ended {code}")
    return code


def train_together(stage: Stage, arguments: Sequence[str]) -> None:
    """Call `train_ranks` with the processes that torchrun has started beside this one, if any.

    Args:
        stage: the stage at work.
        arguments: of Python, which train a rank.

    Raises:
        StageError: training failed here, or on another rank, which is named.
    """
    rank = joined_rank()
    if rank is None:
        train_ranks(stage, arguments)
        return
    if rank == 0:
        _tell(stage.name, _TRAIN)
    store, key = _store(stage.name)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        train_ranks(stage, arguments)
    except ExpectedError as error:
        store.compare_set(f"{key}/failure", "", json.dumps([error.what, error.found, error.fix]))
        raise
    except KeyboardInterrupt:
        if not store.check([f"{key}/failure"]):
            raise
        what, found, fix = json.loads(store.get(f"{key}/failure"))
        raise StageError(
            f"rank {rank} was ended, since another rank has failed",
            "every rank to go on to the end",
            f"{what}: {found}",
            fix,
            consequence=True,
        ) from None
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt(signum: int, _frame: object) -> None:
    raise KeyboardInterrupt(signal.Signals(signum).name)


def _follow(name: str, argv: list[str] | None, trainer: Callable[[Stage], Sequence[str]]) -> int:
    arguments = parse_arguments(name, "", argv)
    store, key = _store(name)
    store.wait([key], _PATIENCE)
    word, _, code = store.get(key).decode().partition(" ")
    if word == _TRAIN:
        stage = Stage(name, load(arguments.config, arguments.overrides), arguments.run_dir)
        try:
            train_together(stage, trainer(stage))
        except KeyboardInterrupt as signalled:
            print(f"rank {joined_rank()} was interrupted: {signalled}", file=sys.stderr, flush=True)
            return 1
        return 0
    if code != "0":
        print(f"rank {joined_rank()}: rank 0 failed, see its message", file=sys.stderr)
    return int(code)


def _tell(name: str, word: str) -> None:
    """Set the shared status; a final status is never overwritten."""
    store, key = _store(name)
    if word == _TRAIN or not store.check([key]):
        store.set(key, word)


def _check_launcher(name: str) -> None:
    """Raise if several processes were started by a launcher that they cannot meet through."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise StageError(
            f"several processes were started together, but not by torchrun (rank {joined_rank()})",
            f"torchrun or accelerate launch, or plain python {name}.py on one machine",
            "WORLD_SIZE without torchrun's own variables",
            f"torchrun --nproc_per_node=N {name}.py ...",
        )


def _store(name: str) -> tuple[TCPStore, str]:
    """Return the store by which torchrun's processes meet, and the stage's key in it."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return TCPStore(host, port, is_master=False), f"sparselong/{name}/{attempt}"
