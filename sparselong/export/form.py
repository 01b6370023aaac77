"""What a format of stage 05 must have. No torch.

A format is made in two steps, `write` and `verify`, in its part's directory `05_export/NAME`. Both
may be repeated after an interruption. Modules of formats import torch inside of these two methods
only, so that a refusal does not wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from sparselong.run import Stage


@dataclass(frozen=True)
class Work:
    """What a format would read, write and compute.

    Attributes:
        written_bytes: bytes on disk.
        read_bytes: bytes of earlier stages that are read, each time counted.
        decoded_weights: weights that are decoded from MXFP4, each time counted.
        file: name of the file that is written, if another format of the same run links the same
            one instead of writing it again.
        uploaded_bytes: bytes that are sent over the network.
    """

    written_bytes: int
    read_bytes: int
    decoded_weights: int = 0
    file: str = ""
    uploaded_bytes: int = 0


class Format(Protocol):
    """A form of the model."""

    name: str
    """As in `--to NAME`, and that of its directory."""
    summary: str
    """What it is, in a few words."""

    def check(self, stage: Stage) -> None:
        """Raise ConfigError if a run with this config and these options cannot give the form."""
        ...

    def plan(self, stage: Stage) -> Work:
        """Return what the format would read, write and compute."""
        ...

    def write(self, stage: Stage) -> None:
        """Write the files to `stage.dir`, each whole or not at all; keep those that are done."""
        ...

    def verify(self, stage: Stage) -> dict[str, Any]:
        """Open the finished directory as its readers do, compare it, and return the metrics.

        Raises:
            StageError: it is not what was to be written.
        """
        ...
