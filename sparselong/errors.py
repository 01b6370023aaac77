"""Failures that a person can mend, told in four lines instead of a traceback.

An expected failure says what went wrong, what was expected, what was found and how to fix it.
Everything else keeps its traceback: a bug must look like a bug.
"""

from typing import Any


class ExpectedError(Exception):
    """A failure with its explanation; `exit_code` is what the script returns.

    Args:
        what: what could not be done, naming the file, key or step.
        expected: what would have been right.
        found: what was there instead.
        fix: what the reader should do next.
        details: more for programs: added to the JSON document that `--json` prints.
        consequence: whether it only follows from another process's failure, which is the one to
            report where there is a choice.
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
        super().__init__(
            f"error:    {what}\nexpected: {expected}\nfound:    {found}\nfix:      {fix}"
        )

    def explanation(self) -> dict[str, str]:
        """Return the four lines by name."""
        return {key: getattr(self, key) for key in ("what", "expected", "found", "fix")}


class ConfigError(ExpectedError):
    """The command line or the configuration is wrong (exit code 2)."""

    exit_code = 2


class StageError(ExpectedError):
    """A stage failed, or the machine is not ready for it (exit code 1)."""
