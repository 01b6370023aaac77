"""Let the machines of one run find out, before anything heavy, that they do not fit together.

torchrun starts its processes on each machine by a command of its own, and tells none of them what
the others were given. So before the stage begins, each process writes its place to the rendezvous
store, the first one of each machine also what it finds wrong with the config, and all read all of
it: every machine then shows the same message, and none waits for another that has ended.

Later, rank 0 leaves a token in the stage's directory and in the store; a machine where the
directory holds another token, or none, does not see rank 0's files.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparselong.errors import ExpectedError, StageError
from sparselong.files import load_json, reason_of, write_atomically

if TYPE_CHECKING:  # imported where it is needed: refusing a config needs no torch
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

FILE = "machines.json"
"""Which machines run the stage, and rank 0's token."""
_MEETING_SECONDS = 300.0
"""How long one process may reach a point after another: some import torch from a busy disk."""
_SIGHT_SECONDS = 120.0
"""How long a file may take to appear on other machines: twice NFS's longest caching of folders."""
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 10.0
"""How long ranks have to notice another's failure, and to explain it, before they are stopped."""


class MachinesError(StageError):
    """A failure that all processes see, so that only the first one of each machine shows it all.

    Args:
        error: the failure.
    """

    def __init__(self, error: ExpectedError):
        super().__init__(error.what, error.expected, error.found, error.fix)
        self.exit_code = error.exit_code

    def show(self) -> str:
        """Return the text for this process to print."""
        rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
        return str(self) if local == 0 else f"rank {rank}: see the message of rank {rank - local}"


@dataclass(frozen=True)
class Place:
    """Where a rank runs.

    Attributes:
        local: its number among the processes of its machine.
        here: number of processes that were started on its machine.
        host: name of its machine.
        gpus: number of GPUs there that torch can use.
        refused: what, expected, found and fix of what the process refuses, and its exit code.
    """

    local: int
    here: int
    host: str
    gpus: int = 0
    refused: tuple[str, str, str, str, int] | None = None

    @classmethod
    def of_process(cls, refused: ExpectedError | None = None) -> Place:
        """Return this process's place by torchrun's variables."""
        import torch

        local, here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        texts = None
        if refused is not None:
            what, expected, found, fix = refused.explanation().values()
            texts = (what, expected, found, fix, refused.exit_code)
        return cls(local, here, socket.gethostname(), torch.cuda.device_count(), texts)


def meet(store: TCPStore, key: str, place: Place, seconds: float = _MEETING_SECONDS) -> None:
    """Exchange all processes' places; raise unless their machines fit together.

    Args:
        store: torchrun's rendezvous store.
        key: prefix of the keys to use in it.
        place: this process's place.
        seconds: how long to wait for the other processes.

    Raises:
        MachinesError: on every process: one is missing, or as from `check_places`.
    """
    texts = gather(store, f"{key}/place", json.dumps(asdict(place)), seconds)
    check_places([Place(**json.loads(text)) for text in texts])


def gather(
    store: TCPStore, key: str, text: str = "", seconds: float = _MEETING_SECONDS
) -> list[str]:
    """Return every process's text, in rank order.

    Args:
        store: torchrun's rendezvous store.
        key: prefix of the keys to use in it.
        text: this process's text.
        seconds: how long to wait for the other processes.

    Raises:
        MachinesError: a process is missing.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    keys, deadline = [f"{key}/{each}" for each in range(size)], time.monotonic() + seconds
    store.set(keys[rank], text)
    while not store.check(keys):  # unlike `wait`, signals end it
        if time.monotonic() > deadline:
            missing = [str(each) for each in range(size) if not store.check([keys[each]])]
            error = StageError(
                f"rank {', '.join(missing)} did not begin, or has ended",
                f"all {size} processes within {seconds:.0f} s",
                f"{size - len(missing)} processes",
                "see what torchrun prints on the machines of these ranks",
            )
            raise MachinesError(error)
        time.sleep(_POLL_SECONDS)
    return [each.decode() for each in store.multi_get(keys)]


def check_places(places: list[Place]) -> None:
    """Raise unless the machines fit together.

    Args:
        places: the place of each rank.

    Raises:
        MachinesError: a process refuses the config; the ranks are not numbered machine by machine
            with as many on each; or some have a GPU, but not all.
    """
    for rank, place in enumerate(places):
        if place.refused is not None:
            what, expected, found, fix, code = place.refused
            error = StageError(what, expected, found, fix)
            error.exit_code = code
            if f"rank {rank}" not in error.what:
                error.what += f" (rank {rank}, on {place.host})"
            raise MachinesError(error)
    here = places[0].here
    blocks = [places[first : first + here] for first in range(0, len(places), here)]
    for block in blocks:
        locals_, hosts = [place.local for place in block], {place.host for place in block}
        counts = {place.here for place in block}
        if locals_ != list(range(here)) or len(hosts) > 1 or counts != {here}:
            raise MachinesError(_uneven(places))
    if any(place.gpus for place in places) and any(place.gpus < here for place in places):
        raise MachinesError(_too_few_gpus(places))


def _too_few_gpus(places: list[Place]) -> StageError:
    here = places[0].here
    short = [place for place in places if place.gpus < here and place.local == 0]
    return StageError(
        f"{here} processes on each machine need as many GPUs there",
        f"{here} GPUs that torch can use on every machine, or none on any",
        ", ".join(f"{place.gpus} on {place.host}" for place in short),
        "run nvidia-smi on that machine, or start torchrun with a smaller --nproc_per_node",
    )


def _uneven(places: list[Place]) -> StageError:
    found = [
        f"rank {rank}: {place.local + 1} of {place.here} on {place.host}"
        for rank, place in enumerate(places)
        if place.local == 0 or place.local != places[rank - 1].local + 1
    ]
    return StageError(
        "the machines were not given the same number of processes, machine by machine",
        "as many consecutive ranks on each machine, so that those that share a sequence or experts "
        "are on one",
        "; ".join(found),
        "start torchrun with the same --nproc_per_node on every machine",
    )


def mark_directory(directory: Path, store: TCPStore, key: str) -> None:
    """Leave a token, by which the other machines know rank 0's directory.

    Args:
        directory: the stage's directory.
        store: torchrun's rendezvous store.
        key: prefix of the keys to use in it.
    """
    size = int(os.environ["WORLD_SIZE"])
    places = [json.loads(store.get(f"{key}/place/{rank}")) for rank in range(size)]
    token = uuid.uuid4().hex
    document = {"token": token, "machines": [place["host"] for place in places]}
    write_atomically(directory / FILE, json.dumps(document) + "\n")
    store.set(f"{key}/token", token)


def find_directory(
    directory: Path, store: TCPStore, key: str, seconds: float = _SIGHT_SECONDS
) -> None:
    """Wait until this machine sees rank 0's token; called after `mark_directory` has returned.

    Args:
        directory: the stage's directory, as this process names it.
        store: torchrun's rendezvous store.
        key: as for `mark_directory`.
        seconds: how long to wait; network file systems take a while to show new files.

    Raises:
        MachinesError: the token does not appear: the directory is not rank 0's.
    """
    token, deadline = store.get(f"{key}/token").decode(), time.monotonic() + seconds
    while found := _why_foreign(directory, token):
        if time.monotonic() > deadline:
            first = json.loads(store.get(f"{key}/place/0"))["host"]
            error = StageError(
                f"rank {os.environ['RANK']} on {socket.gethostname()} does not see the files of "
                f"rank 0 on {first}",
                f"one run directory for all machines, and in it the {FILE} that rank 0 wrote",
                f"after {seconds:.0f} s, for {directory.absolute() / FILE}: {found}",
                "pass a --run-dir on a file system that all machines share, by the same path",
            )
            raise MachinesError(error)
        time.sleep(_POLL_SECONDS)


def _why_foreign(directory: Path, token: str) -> str | None:
    """Return what is wrong with the token in a directory; None if it is this one."""
    try:
        os.listdir(directory)  # has NFS look again for files that it knew to be missing
        found = load_json(directory / FILE).get("token")
    except (OSError, ValueError) as error:
        return reason_of(error)
    return None if found == token else "the file of another run"


@contextmanager
def stopped_with_others(
    store: TCPStore, failure: str, grace_seconds: float = _GRACE_SECONDS
) -> Iterator[None]:
    """Send SIGTERM to this process in the block when a process of another machine has failed.

    torchrun itself ends only the processes of the machine where one failed.

    Args:
        store: a connection to the rendezvous store that only this block uses.
        failure: key at which a process writes its failure.
        grace_seconds: how long to wait before the signal.
    """
    from torch.distributed import DistError  # pyright: ignore[reportPrivateImportUsage]

    ended = threading.Event()

    def listen() -> None:
        # If the store is gone, the ranks' own watch says so.
        with suppress(DistError):
            while not ended.wait(_POLL_SECONDS):
                if store.check([failure]):
                    if not ended.wait(grace_seconds):
                        os.kill(os.getpid(), signal.SIGTERM)
                    return

    listener = threading.Thread(target=listen, name="stopped_with_others", daemon=True)
    listener.start()
    try:
        yield
    finally:
        ended.set()
        listener.join()
