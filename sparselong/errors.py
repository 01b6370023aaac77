"""Failures that the user can fix, reported in four lines instead of a traceback.

An expected failure says what went wrong, what was expected, what was found and how to fix it.
All other exceptions keep their traceback, so that a bug can be recognized and located.
"""

from typing import Any, Self


class ExpectedError(Exception):
    """A failure with an explanation; `exit_code` is the exit code of the script.

    Args:
        what: what failed, naming the file, key or step.
        expected: what was expected.
        found: what was found instead.
        fix: what the user should do next.
        details: more fields for the JSON document that `--json` prints.
        consequence: whether the failure only follows from that of another process, which should
            be reported instead if it is known.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        expected: str,
        found: str,
        fix: str,
        details: dict[str, Any] | None = None,
        consequence: bool = False,
    ):
        self.what, self.expected, self.found, self.fix = what, expected, found, fix
        self.details = details or {}
        self.consequence = consequence
        super().__init__(self._text())

    def with_fix(self, fix: str) -> Self:
        """Return this failure with another fix."""
        self.fix = fix
        self.args = (self._text(),)
        return self

    def _text(self) -> str:
        """Return the four lines; a line break in one of them is followed by an indent."""
        lines = {"error": self.what, **self.explanation()}
        del lines["what"]
        return "\n".join(
            f"{f'{key}:':<10}{text}".replace("\n", f"\n{'':10}") for key, text in lines.items()
        )

    def explanation(self) -> dict[str, str]:
        """Return the four lines by name."""
        return {key: getattr(self, key) for key in ("what", "expected", "found", "fix")}


class ConfigError(ExpectedError):
    """An invalid command line or configuration (exit code 2)."""

    exit_code = 2


class StageError(ExpectedError):
    """A failed stage, or a machine that cannot run it (exit code 1)."""
