"""The user's function of `training.metrics`, from a Python file that the config names.

The file is run as the user's own code, once in the stage's process before anything else and once in
rank 0's trainer. Its failures name its file and line.
"""

from __future__ import annotations

import importlib.util
import math
import numbers
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy

from sparselong.errors import StageError

_SHAPE = "a number, or a dict of numbers by name"


class MetricFunction:
    """The function, opened.

    Args:
        place: `FILE.py:FUNCTION`.

    Raises:
        StageError: there is no such file or function, or the file cannot be run.
    """

    def __init__(self, place: str):
        file, _, self.name = place.rpartition(":")
        self.file = Path(file).absolute()
        found: Any = getattr(self._run_file(), self.name, None)
        if not callable(found):
            raise StageError(
                f"training.metrics: {self.file.name} has no function {self.name}",
                f"a function {self.name}(predictions, labels)",
                "nothing of that name" if found is None else f"a {type(found).__name__}",
                f"define it in {self.file}, or name another one",
            )
        self._call: Callable[..., Any] = found

    def _run_file(self) -> Any:
        if not self.file.is_file():
            raise StageError(
                "training.metrics names a file that is not there",
                "a Python file, relative to the directory where the command is run",
                str(self.file),
                "correct the path, or give it in full",
            )
        spec = importlib.util.spec_from_file_location(f"sparselong_{self.file.stem}", self.file)
        assert spec is not None and spec.loader is not None, "it ends with .py"
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise self._explain(error, "cannot be run", "a Python file without errors") from error
        return module

    def __call__(self, predictions: numpy.ndarray, labels: numpy.ndarray) -> dict[str, Any]:
        """Return its figures by name; those that are not finite become None.

        Args:
            predictions: int64 [tokens], the most likely token of each supervised position.
            labels: int64 [tokens], the right ones.

        Raises:
            StageError: it raised an exception, which is named with its line, or returned something
                else.
        """
        try:
            found = self._call(predictions, labels)
        except Exception as error:
            raise self._explain(error, f"failed in {self.name}", _SHAPE) from error
        if isinstance(found, numbers.Real):
            found = {self.name: found}
        if not isinstance(found, Mapping) or not all(
            isinstance(key, str) and isinstance(value, numbers.Real) for key, value in found.items()
        ):
            raise StageError(
                f"training.metrics: {self.name} of {self.file} returned no figures",
                _SHAPE,
                repr(found)[:200],
                "correct it, then run the same command again",
            )
        return {key: _as_json(value) for key, value in found.items()}

    def _explain(self, error: Exception, what: str, expected: str) -> StageError:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if self._is_own(frame)]
        line = own[-1].lineno if own else getattr(error, "lineno", None)
        return StageError(
            f"training.metrics: {self.file} {what}, line {line}",
            expected,
            f"{type(error).__name__}: {error}",
            "correct it, then run the same command again",
        )

    def _is_own(self, frame: traceback.FrameSummary) -> bool:
        return Path(frame.filename) == self.file


def _as_json(value: Any) -> int | float | None:
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if math.isfinite(value) else None
