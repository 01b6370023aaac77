"""Calibration sequences from the training data, and their hidden states between layers.

The encoded training conversations, of any length, are shuffled by the seed, concatenated and cut
into sequences of equal length. Their hidden states after the last finished layer are the only state
that compression carries from layer to layer. They are saved after each layer, so that an
interrupted run resumes with identical values.
"""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sparselong.checkpoint import Checkpoint, write_tensors
from sparselong.config import Config
from sparselong.data import Encoded
from sparselong.errors import StageError


def calibration_tokens(config: Config, train: Encoded) -> torch.Tensor:
    """Return calibration sequences, int64 [sequences, sequence_len].

    There are fewer than `calibration.samples` if the training data is too small, but at least one:
    `open_inputs` has refused less.
    """
    rows = list(range(len(train)))
    random.Random(config.seed).shuffle(rows)
    length = config.calibration.sequence_len
    wanted = config.calibration.samples * length
    stream: list[int] = []
    for row in rows:
        if len(stream) >= wanted:
            break
        stream += train[row][0]
    count = min(wanted, len(stream)) // length
    return torch.tensor(stream[: count * length]).reshape(count, length)


class HiddenStates:
    """Hidden states of the calibration sequences after the finished layers, saved to disk.

    Args:
        path: the file that stores them between layers.
    """

    def __init__(self, path: Path):
        self.path = path
        self.layers_done = 0
        self.states: torch.Tensor = torch.empty(0)

    def start(self, checkpoint: Checkpoint, tokens: torch.Tensor, dtype: torch.dtype) -> None:
        """Load the saved states, or embed the tokens [sequences, length] if there are none.

        Raises:
            StageError: the saved states are damaged.
        """
        if self.path.exists():
            self.layers_done, self.states = self._load()
            return
        distinct, place = tokens.unique(return_inverse=True)
        rows = checkpoint.read_rows("model.embed_tokens.weight", distinct)
        self.states = rows.to(dtype)[place]

    def _load(self) -> tuple[int, torch.Tensor]:
        try:
            saved = load_file(self.path)
            if not torch.equal(_hash(saved["states"]), saved["sha256"]):
                raise ValueError("states with another sha256")
            return int(saved["layers_done"]), saved["states"]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise StageError(
                f"{self.path} is damaged",
                "the states of the calibration sequences, as this stage saved them",
                str(error),
                f"remove {self.path}: the same command then begins at the first layer",
            ) from error

    def save(self, layers_done: int) -> None:
        """Save the current states atomically as those after `layers_done` layers."""
        self.layers_done = layers_done
        saved = {"states": self.states, "sha256": _hash(self.states)}
        write_tensors(self.path, {**saved, "layers_done": torch.tensor(self.layers_done)})


def _hash(states: torch.Tensor) -> torch.Tensor:
    """Return the sha256 of the states' bytes, uint8 [32]."""
    raw = states.cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return torch.tensor(list(hashlib.sha256(raw).digest()), dtype=torch.uint8)
