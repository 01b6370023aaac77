"""Run the endpoint until a signal ends it."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from sparselong.errors import StageError

SHUTDOWN_SECONDS = 5


def serve(
    app: FastAPI,
    listening: socket.socket,
    tell: Callable[[str], None],
    is_over: Callable[[], bool] = lambda: False,
) -> None:
    """Answer requests until SIGINT or SIGTERM.

    Args:
        app: what answers.
        listening: socket from `bind`, which is closed.
        tell: says where, once requests are answered.
        is_over: asked several times a second whether to end.

    Raises:
        StageError: another program was faster to listen at this address.
    """
    with listening:
        host, port = listening.getsockname()[:2]
        try:
            listening.listen()
        except OSError as error:
            raise _taken(host, port, error) from error
        tell(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            server_header=False,
        )
        _Server(config, is_over).run(sockets=[listening])


class _Server(uvicorn.Server):
    """Server that a signal ends as it should; uvicorn's own raises the signal once more."""

    def __init__(self, config: uvicorn.Config, is_over: Callable[[], bool]):
        super().__init__(config)
        self._is_over = is_over

    async def on_tick(self, counter: int) -> bool:
        """Return whether the server ends now; uvicorn calls this ten times a second."""
        return await super().on_tick(counter) or self._is_over()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Let signals end the server inside of the block."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def bind(host: str, port: int) -> socket.socket:
    """Return a socket at an address, which refuses connections until it is served.

    Args:
        host: address to bind.
        port: port to bind; 0 takes a free one.

    Raises:
        StageError: the port is in use, or the address cannot be bound.
    """
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if found.family == socket.AF_INET6:
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        found.bind((host, port))
    except (OSError, OverflowError) as error:
        found.close()
        raise _taken(host, port, error) from error
    return found


def _taken(host: str, port: int, error: Exception) -> StageError:
    return StageError(
        f"{host}:{port} cannot be bound",
        "an address of this machine, and a port that is free",
        str(error),
        "pass another --port (0 takes a free one), or end the program that uses it",
    )
