"""One answer at a time: requests take turns, and the model works in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sparselong.chat.answer import Answer
from sparselong.chat.conversation import Message
from sparselong.chat.engine import Engine, Reply
from sparselong.chat.settings import Settings
from sparselong.data import Delta
from sparselong.errors import ExpectedError
from sparselong.processes import OutOfMemory, telling_memory
from sparselong.runtime import using

MEMORY_FIX = "shorten the conversation, or start the server with a smaller --context"

Item = Delta | Answer


class BusyError(Exception):
    """So many requests wait that another one is refused."""


class AnswerError(Exception):
    """An answer that failed although its request was right.

    It keeps no other exception, whose traceback would hold the GPU's memory.

    Attributes:
        text: for a person.
        status: HTTP status code: 503 if the GPU ran out of memory, otherwise 500.
        code: for programs.
    """

    def __init__(self, error: Exception):
        is_memory, is_expected = isinstance(error, OutOfMemory), isinstance(error, ExpectedError)
        self.text = str(error) if is_expected else f"{type(error).__name__}; see the server's log"
        self.status = 503 if is_memory else 500
        self.code = "out_of_memory" if is_memory else "generation_failed"
        super().__init__(self.text)


class Turns:
    """The order in which requests use the model.

    Args:
        engine: the model. Only this object's thread uses it from now on.
        most_waiting: requests that may wait while one is answered.
        log: told of answers that failed.
    """

    def __init__(self, engine: Engine, most_waiting: int, log: Callable[[str], None]):
        self.engine, self.most_waiting, self._log = engine, most_waiting, log
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
            AnswerError: the answer failed.
        """
        loop, items = asyncio.get_running_loop(), asyncio.Queue[Item | Exception]()
        self._stopped = stopped = threading.Event()

        def put(item: Item | Exception) -> None:
            loop.call_soon_threadsafe(items.put_nowait, item)

        # The thread does one thing after another: an answer that was stopped ends before the next.
        loop.run_in_executor(self._thread, self._generate, messages, settings, tools, stopped, put)
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
        self,
        messages: list[Message],
        settings: Settings,
        tools: list[dict[str, Any]] | None,
        stopped: threading.Event,
        put: Callable[[Item | Exception], None],
    ) -> None:
        """Put an answer's pieces and the whole, or why there is none, into a queue."""
        try:
            with using(**self.engine.settled):
                reply = self.engine.reply(
                    messages, settings, tools=tools, is_cancelled=stopped.is_set
                )
                for item in self._pieces(reply):
                    put(item)
        except Exception as error:  # raised where the answer is awaited
            put(error)

    def _pieces(self, reply: Reply) -> Iterator[Item]:
        """Yield an answer's pieces and the whole; log a failure and raise it as AnswerError."""
        try:
            with telling_memory("while it generated an answer", MEMORY_FIX):
                yield from reply
            yield reply.answer
        except Exception as error:
            is_expected = isinstance(error, ExpectedError)
            self._log(f"an answer failed\n{error if is_expected else traceback.format_exc()}")
            failed = AnswerError(error)
        else:
            return
        raise failed
