"""Worker processes that wait for functions to run; started once and shared by all tests.

They are forked from one server that has imported torch and transformers, so a process starts in
milliseconds instead of the half minute that four processes on two cores need for these imports.
Axolotl is never imported here.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

PRELOADED = [
    "torch",
    "torch.distributed",
    "transformers.models.gpt_oss.modeling_gpt_oss",
    "tests.distributed.cases",
    "tests.distributed.training",
]
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(PRELOADED)


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Pool:
    """`size` processes connected by torch.distributed; with NCCL each has its own GPU.

    `fresh` processes import everything again, under the current environment.
    """

    def __init__(
        self,
        size: int,
        timeout_seconds: float = 60.0,
        backend: str = "gloo",
        fresh: bool = False,
    ):
        self.size, self.timeout_seconds = size, timeout_seconds
        port = free_port()
        # Imports may have initialized CUDA, which does not survive a fork.
        fresh = fresh or backend == "nccl"
        started_from = multiprocessing.get_context("spawn") if fresh else context
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = started_from.Pipe()
            arguments = (rank, size, port, timeout_seconds, backend, theirs)
            process = started_from.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return `function(*arguments)` of every rank; the function is found by module and name.

        Raises:
            AssertionError: If a rank raised; the message is its traceback.
        """
        outcomes = self.try_run(function, *arguments)
        failures = [f"rank {n}:\n{o[1]}" for n, o in enumerate(outcomes) if o[0] != "done"]
        assert not failures, "\n".join(failures)
        return [outcome[1] for outcome in outcomes]

    def try_run(self, function: Callable[..., Any], *arguments: Any) -> list[tuple[str, Any]]:
        """Return ("done", result), ("raised", traceback) or ("died", exit code) by rank.

        Raises:
            AssertionError: If a rank has not answered after three times the exchange timeout.
        """
        for pipe in self.pipes:
            pipe.send((function, arguments))
        outcomes: dict[int, tuple[str, Any]] = {}
        deadline = time.monotonic() + 3 * self.timeout_seconds
        while len(outcomes) < self.size:
            waiting = {self.pipes[n]: n for n in range(self.size) if n not in outcomes}
            ready = wait(list(waiting), timeout=deadline - time.monotonic())
            assert ready, f"ranks {sorted(waiting.values())} have not answered"
            for pipe in ready:
                rank = waiting[pipe]  # type: ignore[index]
                try:
                    outcomes[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    self.processes[rank].join()
                    outcomes[rank] = ("died", self.processes[rank].exitcode)
        return [outcomes[n] for n in range(self.size)]

    def close(self) -> None:
        """Stop the processes."""
        for process in self.processes:
            process.terminate()
            process.join()


def _serve(
    rank: int, size: int, port: int, timeout_seconds: float, backend: str, pipe: Connection
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    timeout = timedelta(seconds=timeout_seconds)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:  # the pool was closed
            return
        try:
            outcome = ("done", function(*arguments))
        except Exception:
            outcome = ("raised", traceback.format_exc())
        pipe.send(outcome)
