"""Notes while a model trains for how long it has."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from sparselong.finetune.watching.spent import note_session

_NOTED_SECONDS = 30.0


class Clock(TrainerCallback):
    """Notes for how long the session has trained (spent.py), at most twice a minute.

    Args:
        folder: the stage's directory; None on a rank that writes nothing.
    """

    def __init__(self, folder: Path | None):
        self.folder, self.noted = folder, time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        """Note the name of the GPU."""
        if self.folder is not None and torch.cuda.is_available():
            note_session(self.folder, torch.cuda.get_device_name())

    def on_step_end(self, args, state, control, **kwargs):
        """Note the time."""
        if self.folder is not None and time.monotonic() - self.noted >= _NOTED_SECONDS:
            self.noted = time.monotonic()
            note_session(self.folder)
