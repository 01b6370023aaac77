"""Rows of metrics.jsonl for TensorBoard, Weights & Biases and trackio.

The three get the same figures under the same names. They are opened at the first row, by rank 0
alone. A tracker that fails later is reported and gets no more rows; metrics.jsonl has them all.
Their packages are looked for before training starts.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, Protocol

from sparselong.config import Config
from sparselong.errors import StageError
from sparselong.finetune.training_run import TENSORBOARD, TrainingRun
from sparselong.processes import tell
from sparselong.provenance import install_command, missing_modules


class Tracker(Protocol):
    """A place that gets rows."""

    def log(self, row: dict[str, Any]) -> None:
        """Take a row of metrics.jsonl."""

    def close(self) -> None:
        """Write what is still to be written."""


def check_trackers(config: Config) -> None:
    """Raise if a tracker that the config asks for is not installed.

    Raises:
        StageError: names its key, and the command that installs it.
    """
    for key, modules in config.training.tracker_modules.items():
        missing = missing_modules(modules)
        if missing:
            raise StageError(
                f"training.{key} needs packages that are not installed",
                ", ".join(modules),
                f"no {', '.join(missing)}",
                f"{install_command(missing)}, or unset the key",
            )


def open_trackers(run: TrainingRun, name: str, first_step: int) -> list[Tracker]:
    """Return the trackers that the run's config asks for.

    Args:
        run: the run.
        name: its name for trackers, the same after an interruption.
        first_step: step of the first row; rows from there on are of an interrupted run.

    Raises:
        StageError: one cannot be opened.
    """
    kinds = {"use_tensorboard": _TensorBoard, "wandb_project": _Wandb, "trackio_project": _Trackio}
    opened: list[Tracker] = []
    for key in run.config.training.tracker_modules:
        try:
            opened.append(_Careful(key, kinds[key](run, name, first_step)))
        except Exception as error:
            raise StageError(
                f"training.{key} could not be opened",
                "a tracker that takes figures",
                f"{type(error).__name__}: {error}",
                "correct what it names, or unset the key; then run the same command again",
            ) from error
    return opened


class _Careful:
    """A tracker whose first failure is its last."""

    def __init__(self, key: str, tracker: Tracker):
        self.key, self.tracker = key, tracker
        self.failed = False

    def log(self, row: dict[str, Any]) -> None:
        self._attempt(lambda: self.tracker.log(row))

    def close(self) -> None:
        self._attempt(self.tracker.close)

    def _attempt(self, action: Any) -> None:
        if self.failed:
            return
        try:
            action()
        except Exception as error:
            self.failed = True
            tell(f"training.{self.key} gets no more figures: {type(error).__name__}: {error}")


class _TensorBoard:
    def __init__(self, run: TrainingRun, name: str, first_step: int):
        module: Any = importlib.import_module("torch.utils.tensorboard")
        folder = str(run.work / TENSORBOARD)
        self._writer = module.SummaryWriter(folder, purge_step=first_step)

    def log(self, row: dict[str, Any]) -> None:
        for name, value in _figures(row):
            self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run: TrainingRun, name: str, first_step: int):
        module: Any = importlib.import_module("wandb")
        self._run = module.init(
            project=run.config.training.wandb_project,
            name=run.directory.name,
            id=name,
            resume="allow",
            dir=str(run.work),
            config=run.config.model_dump(mode="json"),
            settings=module.Settings(console="off"),  # log.txt has it
        )

    def log(self, row: dict[str, Any]) -> None:
        self._run.log(dict(_figures(row)), step=row["step"])

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, run: TrainingRun, name: str, first_step: int):
        self._module: Any = importlib.import_module("trackio")
        self._module.init(
            project=run.config.training.trackio_project,
            name=f"{run.directory.name}-{name}",
            resume="allow",
            config=run.config.model_dump(mode="json"),
            embed=False,
        )

    def log(self, row: dict[str, Any]) -> None:
        self._module.log(dict(_figures(row)), step=row["step"])

    def close(self) -> None:
        self._module.finish()


def _figures(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield a row's numbers by name; those of the user's function are named metrics/NAME."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{inner}", number) for inner, number in _figures(value))
        elif name != "step" and value is not None:
            yield name, value
