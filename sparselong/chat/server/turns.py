"""One answer at a time: requests take turns, and the model works in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sparselong.chat.answer import Answer
from sparselong.chat.conversation import Message
from sparselong.chat.engine import Engine
from sparselong.chat.settings import Settings
from sparselong.data import Delta
from sparselong.runtime import using

Item = Delta | Answer


class BusyError(Exception):
    """So many requests wait that another one is refused."""


class Turns:
    """The order in which requests use the model.

    Args:
        engine: the model. Only this object's thread uses it from now on.
        most_waiting: requests that may wait while one is answered.
    """

    def __init__(self, engine: Engine, most_waiting: int):
        self.engine, self.most_waiting = engine, most_waiting
        self.waiting = self.running = 0
        self._lock = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, "generation")
        self._stopped = threading.Event()

    async def begin(self) -> None:
        """Wait for the model; `end` gives it to the next request.

        Raises:
            BusyError: too many requests wait already.
        """
        if self._lock.locked() and self.waiting >= self.most_waiting:
            raise BusyError
        self.waiting += 1
        try:
            await self._lock.acquire()
        finally:
            self.waiting -= 1
        self.running = 1

    def end(self) -> None:
        """Stop the running answer if there is one, and give the model to the next request."""
        self.stop()
        self.running = 0
        self._lock.release()

    def stop(self) -> None:
        """Let the running answer end after the token that it is at."""
        self._stopped.set()

    async def answer(
        self,
        messages: list[Message],
        settings: Settings,
        tools: list[dict[str, Any]] | None,
    ) -> AsyncGenerator[Item, None]:
        """Yield an answer's pieces, and the whole at the end; between `begin` and `end`.

        Raises:
            StageError: see `Engine.reply`.
        """
        loop, items = asyncio.get_running_loop(), asyncio.Queue[Item | Exception]()
        self._stopped = stopped = threading.Event()

        def put(item: Item | Exception) -> None:
            loop.call_soon_threadsafe(items.put_nowait, item)

        # The thread does one thing after another: an answer that was stopped ends before the next.
        loop.run_in_executor(
            self._thread, _generate, self.engine, messages, settings, tools, stopped, put
        )
        while True:
            item = await items.get()
            if isinstance(item, Exception):
                raise item
            yield item
            if isinstance(item, Answer):
                return

    def close(self) -> None:
        """Let the running answer end; begin no other."""
        self._thread.shutdown(cancel_futures=True)


def _generate(
    engine: Engine,
    messages: list[Message],
    settings: Settings,
    tools: list[dict[str, Any]] | None,
    stopped: threading.Event,
    put: Callable[[Item | Exception], None],
) -> None:
    """Put an answer's pieces and the whole, or what was raised, into a queue."""
    try:
        with using(**engine.settled):
            reply = engine.reply(messages, settings, tools=tools, is_cancelled=stopped.is_set)
            for delta in reply:
                put(delta)
        put(reply.answer)
    except Exception as error:  # raised where the answer is awaited
        put(error)
