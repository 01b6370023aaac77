"""Signals that end a stage, whatever becomes of the exception that they raise.

A signal raises KeyboardInterrupt wherever the main thread happens to be. Inside a library's C code
that may come out as another exception, or vanish. So the signal is noted as well: a block that ends
after one was interrupted, not broken.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from sparselong.errors import ExpectedError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interruption:
    """The first signal that was heard; `name` is None before."""

    name: str | None = None

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal was heard; what it raised may have been swallowed."""
        if self.name is not None:
            raise KeyboardInterrupt(self.name)


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Raise KeyboardInterrupt with the signal's name in the block, and in any case at its end.

    Signals that the process ignores, such as SIGHUP under nohup, stay ignored.

    Raises:
        KeyboardInterrupt: a signal was heard. Only an ExpectedError that explains this
            KeyboardInterrupt takes its place.
    """
    heard = Interruption()

    def interrupt(number: int, frame: object) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        heard.name = heard.name or name
        raise KeyboardInterrupt(name)

    numbers = [each for each in _SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]
    previous = {each: signal.signal(each, interrupt) for each in numbers}
    try:
        yield heard
        heard.check()
    except BaseException as error:
        if heard.name is None or isinstance(error, KeyboardInterrupt) or _explains(error):
            raise
        raise KeyboardInterrupt(heard.name) from error
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


def _explains(error: BaseException) -> bool:
    """Return whether an error is an expected one that was made from a KeyboardInterrupt."""
    if not isinstance(error, ExpectedError):
        return False
    seen: set[int] = set()
    following: list[BaseException | None] = [error]
    while following:
        each = following.pop()
        if isinstance(each, KeyboardInterrupt):
            return True
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            following += [each.__cause__, each.__context__]
    return False
