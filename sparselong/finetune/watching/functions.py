"""The user's function of `training.metrics`, from a Python file that the config names.

The file is run as the user's own code, once in the stage's process before anything else and once in
rank 0's trainer. Its failures name its file and line.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import numbers
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy

from sparselong.errors import StageError

_SHAPE = "a number, or a dict of numbers by name"
_CALL = "a function that takes predictions and labels"


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
                _CALL,
                "nothing of that name" if found is None else f"a {type(found).__name__}",
                f"define it in {self.file}, or name another one",
            )
        self._call: Callable[..., Any] = found
        try:
            inspect.signature(found).bind(None, None)
        except TypeError as error:
            raise self._explain(error, f"has {self.name} with other arguments", _CALL) from error
        except ValueError:  # a built-in function, which does not say what it takes
            pass

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
        sys.modules[spec.name] = module  # dataclasses and pickle look for it there
        try:
            spec.loader.exec_module(module)
        except (
            Exception,
            SystemExit,
        ) as error:  # the latter would end the stage as if it were done
            raise self._explain(error, "cannot be run", "a Python file without errors") from error
        return module

    def __call__(self, predictions: numpy.ndarray, labels: numpy.ndarray) -> dict[str, Any]:
        """Return its figures by name; those that no float can hold, such as NaN, become None.

        Args:
            predictions: int64 [tokens], the most likely token of each supervised position.
            labels: int64 [tokens], the right ones.

        Raises:
            StageError: it raised an exception, which is named with its line, or returned something
                else.
        """
        try:
            found = self._call(predictions, labels)
        except (Exception, SystemExit) as error:
            raise self._explain(error, f"failed in {self.name}", _SHAPE) from error
        if isinstance(found, numbers.Real):
            found = {self.name: found}
        if (
            not isinstance(found, Mapping)
            or not found
            or not all(
                isinstance(key, str) and key and isinstance(value, numbers.Real)
                for key, value in found.items()
            )
        ):
            raise StageError(
                f"training.metrics: {self.name} of {self.file} returned no figures",
                _SHAPE,
                repr(found)[:200],
                "correct it, then run the same command again",
            )
        return {key: _as_json(value) for key, value in found.items()}

    def _explain(self, error: BaseException, what: str, expected: str) -> StageError:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if self._is_own(frame)]
        line = own[-1].lineno if own else getattr(error, "lineno", None)
        return StageError(
            f"training.metrics: {self.file} {what}" + (f", line {line}" if line else ""),
            expected,
            f"{type(error).__name__}: {error}",
            "correct it, then run the same command again",
        )

    def _is_own(self, frame: traceback.FrameSummary) -> bool:
        return Path(frame.filename) == self.file


def _as_json(value: Any) -> int | float | None:
    try:
        is_finite = math.isfinite(value)
    except OverflowError:  # an integer beyond all floats, which no tracker takes
        is_finite = False
    if not is_finite:
        return None
    return int(value) if isinstance(value, numbers.Integral) else float(value)
