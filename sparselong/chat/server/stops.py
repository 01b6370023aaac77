"""Texts that end an answer."""

from __future__ import annotations


class StopTexts:
    """Passes on text until one of the stop texts appears in it.

    What may be the beginning of one is held back until more text tells.

    Args:
        texts: the stop texts; none: everything is passed on.
    """

    def __init__(self, texts: list[str]):
        self._texts, self._held, self.found = texts, "", False

    def feed(self, text: str) -> str:
        """Return what can be passed on; `found` says whether a stop text came."""
        self._held += text
        places = [at for stop in self._texts if (at := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            passed, self._held = self._held[: min(places)], ""
            return passed
        keep = max(map(self._begun, self._texts), default=0)
        passed = self._held[: len(self._held) - keep]
        self._held = self._held[len(passed) :]
        return passed

    def close(self) -> str:
        """Return what was held back."""
        held, self._held = self._held, ""
        return held

    def _begun(self, stop: str) -> int:
        """Return how many characters at the end may be the beginning of a stop text."""
        return next(
            (n for n in range(min(len(stop) - 1, len(self._held)), 0, -1)
             if self._held.endswith(stop[:n])),
            0,
        )  # fmt: skip
