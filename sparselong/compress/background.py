"""A thread that works beside the computation, and the seconds of each part of the work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch


class Background:
    """A thread that does one job at a time; a job's error is raised by the next `join`.

    At the end of a `with` block the running job is waited for; after an error none is begun.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._job: Future[Any] | None = None

    def start(self, job: Callable[..., Any], *arguments: Any) -> None:
        """Begin a job, once the one before has ended.

        Raises:
            BaseException: the job before raised it.
        """
        self.join()
        self._job = self._pool.submit(job, *arguments)

    def join(self) -> Any:
        """Return the result of the job that was begun last; None if it was returned before.

        Raises:
            BaseException: the job raised it.
        """
        job, self._job = self._job, None
        return None if job is None else job.result()

    def __enter__(self) -> Background:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.join()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)


class Seconds:
    """Seconds by part of the work; a GPU's part ends when the GPU has done it.

    Args:
        device: where the parts compute; None: they compute nothing.

    Attributes:
        by_part: seconds by the part's name, summed.
    """

    def __init__(self, device: torch.device | None = None):
        self._device = device
        self.by_part: dict[str, float] = {}

    @contextmanager
    def measuring(self, part: str) -> Iterator[None]:
        """Add the block's seconds to a part's; those of a block that fails are not counted."""
        begun = time.perf_counter()
        yield
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.by_part[part] = self.by_part.get(part, 0.0) + time.perf_counter() - begun
